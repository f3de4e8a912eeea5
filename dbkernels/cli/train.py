"""`python -m dbkernels train`."""

import os
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.data.images import open_data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models.registry import FAMILIES, FamilyName, family_named
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.settings import check_number
from dbkernels.training.pending import Row
from dbkernels.training.run import PartitionConfig, RunConfig, train
from dbkernels.training.same_run import DataChanged
from dbkernels.training.stop import Stopped
from dbkernels.training.trainer_config import TrainerConfig

LARGEST = 2**16  # of a model's sizes
FAMILY_HELP = "; ".join(f"{name} {entry.summary}" for name, entry in FAMILIES.items()) + "."
PRESET_HELP = "Sizes of the model by name. " + " ".join(
    f"{name}: {', '.join(entry.model.presets)}." for name, entry in FAMILIES.items()
)


# values are judged where the configuration is made: the parser would name its own inner fields
@dataclass(frozen=True)
class PriorFlags(LogNormal):
    """The prior over sigma."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class TrainerFlags(TrainerConfig):
    """How blocks are trained."""

    steps: int = 1000
    """Updates of every block."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class Train:
    """Train a model block by block, or end to end with --num-blocks 1."""

    family: Annotated[Positional[FamilyName], tyro.conf.arg(help=FAMILY_HELP)]
    out: Path
    """Directory of the run: its configuration, log and checkpoints."""
    data: str = "digits"
    """digits (scikit-learn's), or a path: a folder of images, .npz, CIFAR's files, latents .npy."""
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = "digits"
    patch: int = 0
    """Pixels, or cells of a latent, per side of a patch; 0 keeps the preset's."""
    dim: int = 0
    """Width of the residual stream; 0 keeps the preset's."""
    depth: int = 0
    """Number of layers; 0 keeps the preset's."""
    num_heads: int = 0
    """Attention heads; 0 keeps the preset's."""
    recompute: Recompute = "none"
    """What the backward of a layer computes again instead of keeping it, from least to most."""
    weighting: Literal["auto", "none", "edm", "normalised", "published"] = "auto"
    """Weight of the noise levels in the loss; auto is the family's own."""
    label_drop: float = 0.0
    """Share of labels dropped in training, for classifier-free guidance."""
    mirror: bool = False
    """Mirror images left to right at random."""
    shift: int = 0
    """Move images by up to so many pixels at random."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    prior: PriorFlags = field(default_factory=PriorFlags)
    trainer: TrainerFlags = field(default_factory=TrainerFlags)
    device: str = "auto"
    """auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    resume: str = ""
    """Go on from latest, or from the path of a checkpoint of this run; repeat the run's flags."""
    data_changed: DataChanged = "refuse"
    """Whether to resume with data that are not those of the checkpoint."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end alone."""
    keep: int = 2
    """Checkpoints that are kept; where the newest is damaged the one before it serves."""
    requeue: bool = False
    """Exit with 75 where a signal ends the run, as schedulers want; else with 128 + its number."""
    tensorboard: bool = False
    """Log to TensorBoard too."""

    def config(self) -> RunConfig:
        """The run that the flags describe.

        Raises:
            ValueError: a flag has a value that it cannot have, or the data cannot be used.
        """
        prior, trainer = LogNormal(**asdict(self.prior)), TrainerConfig(**asdict(self.trainer))
        if not self.data:
            raise ValueError("data must be digits or a path, got an empty text")
        sizes = {k: getattr(self, k) for k in ("patch", "dim", "depth", "num_heads")}
        for name, size in sizes.items():
            check_number(name, size, 0, LARGEST)
        entry = family_named(self.family)
        own = entry.model.preset(self.preset).resized({k: v for k, v in sizes.items() if v})
        model = own.fitted(open_data(self.data))
        as_given = ("family", "data", "label_drop", "mirror", "shift", "partition")
        return RunConfig(
            model=replace(model, recompute=self.recompute),
            weighting=entry.weighting if self.weighting == "auto" else self.weighting,
            prior=prior,
            trainer=trainer,
            **{name: getattr(self, name) for name in as_given},
        )

    def run(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a directory, got the file {self.out}")
        config = self.config()
        shown = ProgressBar(config.trainer.steps * config.partition.num_blocks)
        with warnings.catch_warnings(), shown:
            warnings.showwarning = shown.warn
            try:
                trainer = train(
                    config,
                    self.out,
                    device=pick_device(self.device),
                    resume=self.resume,
                    data_changed=self.data_changed,
                    save_every=self.save_every,
                    keep=self.keep,
                    tensorboard=self.tensorboard,
                    on_step=shown.step,
                )
            except Stopped as stopped:
                shown.warn(stopped)
                sys.exit(os.EX_TEMPFAIL if self.requeue else 128 + stopped.signal)
        if not shown.steps:
            print(f"nothing to do: all {trainer.total_steps} steps are trained already: {self.out}")
            return
        count = len(trainer.blocks)
        print(f"trained {shown.steps} steps in {count} block{'s' * (count > 1)}: {self.out}")


class ProgressBar(Progress):
    """A bar on stderr that appears with the first step, so that a refusal is one line.

    Args:
        total:  steps of the run
    """

    def __init__(self, total: int):
        self.total, self.steps = total, 0
        columns = *Progress.get_default_columns()[:-1], TimeRemainingColumn(), "{task.fields[row]}"
        # whole lines: a message that is cut at the terminal's width cannot be searched for
        super().__init__(*columns, console=Console(stderr=True, soft_wrap=True), disable=True)

    def warn(self, message: Warning | str, *_: object) -> None:
        """Show a warning above the bar, without the line of code that gave it."""
        self.console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def step(self, row: Row) -> None:
        """Show one row of the log."""
        if not self.steps:
            self.disable = False
            self.start()
            self._task = self.add_task("training", total=self.total, row="")
        self.steps += 1
        text = f"block {row['block']} loss {row['loss']:.4g}"
        self.update(self._task, completed=row["step"] + 1, row=text)
