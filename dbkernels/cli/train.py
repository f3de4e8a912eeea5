"""`python -m dbkernels train`."""

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional

from dbkernels.cli.device import own_device, pick_device
from dbkernels.cli.noise_flags import NoiseFlags, PriorFlags
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.text_flags import TextFlags, require_settings
from dbkernels.convert import open_trained
from dbkernels.data.image_folder import Convert
from dbkernels.diffusion.process import NoiseOrder
from dbkernels.models.registry import FAMILIES, FamilyEntry, FamilyName, family_named
from dbkernels.models.start import Trained
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.settings import check_number
from dbkernels.training.lora_config import Base, LoraConfig
from dbkernels.training.optimizers.decay import DecayOn
from dbkernels.training.parallel.job import Job, open_job
from dbkernels.training.pending import Row
from dbkernels.training.run import part_of, train
from dbkernels.training.run_config import (
    Objective,
    PartitionConfig,
    RunConfig,
    StartConfig,
    read_config,
)
from dbkernels.training.same_run import DataChanged
from dbkernels.training.stop import Stopped
from dbkernels.training.tracking.registry import trackers_named
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

RANDOM_BASE = (
    "adapters leave the network as it is, and this one's weights are random: give one that was "
    "trained with --from"
)
LARGEST = 2**16  # of a model's sizes
FAMILY_HELP = "; ".join(f"{name} {entry.summary}" for name, entry in FAMILIES.items()) + "."
PRESET_HELP = "Sizes of the model by name; empty is the smallest. " + " ".join(
    f"{name}: {', '.join(entry.model.presets)}." for name, entry in FAMILIES.items()
)


@dataclass(frozen=True)
class PartitionFlags(PartitionConfig):
    """How the layers and the noise are cut, and what the blocks share."""

    num_blocks: int | None = None
    """Number of blocks; 1 trains end to end. None: as many as the family has, and 1 for the
    conventional objective."""

    noise_order: NoiseOrder | None = None
    """Layers that meet the most noise: the first, or the deepest. None is the first; but of blocks
    that start from a text model which was trained without noise, it is the deepest."""

    def for_family(
        self,
        entry: FamilyEntry,
        objective: Objective,
        noise_order: NoiseOrder = PartitionConfig.noise_order,
    ) -> PartitionConfig:
        """With the number of blocks and the order where none was given."""
        blocks = 1 if objective == "conventional" else entry.num_blocks
        own = {"num_blocks": blocks, "noise_order": noise_order}
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return PartitionConfig(**own | given)


@dataclass(frozen=True)
class TrainerFlags(TrainerConfig):
    """How blocks are trained."""

    steps: int = 1000
    """Updates of every block."""
    decay_on: DecayOn | None = None
    """What weight decay is on: matrices leaves out norms, biases and tables. None is matrices, or
    what the run had that goes on."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Train:
    """Train a model block by block, or end to end with --num-blocks 1."""

    family: Annotated[Positional[FamilyName], tyro.conf.arg(help=FAMILY_HELP)]
    out: Path
    """Directory of the run: its configuration, log and checkpoints."""
    data: str = "digits"
    """digits (scikit-learn's), fashion (Debian's), or a path: a folder of images, .npz, CIFAR's or
    IDX files, latents .npy; of images and texts, an .npy with embeddings beside it; of text, a
    directory that tokenize wrote."""
    convert: Convert = "none"
    """Channels of a folder's images: grey or rgb makes all alike; none refuses any difference."""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """A network to start from that was trained end to end: a run, one of its checkpoints, or
    somebody else's file that `dbkernels.convert.load` reads. Its sizes are the model's."""
    distill: float = 0.0
    """Share of each block's target that is what the whole network predicts that they start from, 0
    to 1; it is held beside the blocks, frozen."""
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = ""
    patch: int = 0
    """Pixels, or cells of a latent, per side of a patch; 0 keeps the preset's."""
    dim: int = 0
    """Width of the residual stream; 0 keeps the preset's."""
    depth: int = 0
    """Number of layers; 0 keeps the preset's."""
    num_heads: int = 0
    """Attention heads; 0 keeps the preset's."""
    length: int = 0
    """Tokens of a window of text; 0 keeps the preset's."""
    stride: int = 0
    """Tokens from one window's start to the next one's, in training: 1 has a window begin at each
    token. 0 lays windows end to end, as evaluation does in any case."""
    text: TextFlags = field(default_factory=TextFlags)
    noise: NoiseFlags = field(default_factory=NoiseFlags)
    recompute: Recompute = "none"
    """What the backward of a layer computes again instead of keeping it, from least to most."""
    weighting: Literal["auto", "none", "process", "normalised", "published"] = "auto"
    """Weight of the noise levels in the loss; auto is the family's own."""
    objective: Objective = "blocks"
    """blocks: each denoises. conventional: the network as it is trained without noise, end to
    end."""
    lora: int = 0
    """Rank of adapters on every layer, which alone are trained then; 0 trains the network."""
    lora_alpha: float = LoraConfig.alpha
    """They are added alpha / rank times; 0 is the rank."""
    lora_targets: str = LoraConfig.targets
    """Projections with an adapter: q, k, v or qkv, out, fc1, fc2, modulation."""
    lora_base: Base = LoraConfig.base
    """Dtype of the frozen network below adapters."""
    label_drop: float = 0.0
    """Share of labels or texts dropped in training, for classifier-free guidance."""
    mirror: bool = False
    """Mirror images left to right at random."""
    shift: int = 0
    """Move images by up to so many pixels at random."""
    rand_augment: bool = False
    """Change images by torchvision's RandAugment too; it needs images of bytes."""
    partition: PartitionFlags = field(default_factory=PartitionFlags)
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
    save_async: bool = False
    """Write a checkpoint beside the steps that follow it, from a copy in host memory."""
    requeue: bool = False
    """Exit with 75 where a signal ends the run, as schedulers want; else with 128 + its number."""
    threads: int = 0
    """Threads of the CPU, where it trains; 0 keeps the run's own, or finds what is fastest."""
    track: str = ""
    """Show the run in tensorboard, wandb, mlflow or trackio too, or in several with commas between.
    Nothing leaves the machine until it is told otherwise, as by WANDB_MODE=online."""
    workers: int = 0
    """Processes that read the samples of coming steps; 0 has each step read its own. No number of
    the run depends on it."""
    block: int | None = None
    """Train this block alone, from 0, in OUT/block<number>; merge unites the blocks. None: all; of
    blocks that share nothing, each by as many of torchrun's processes as the others."""
    tensor_parallel: int = 1
    """Processes that share each layer, of those that torchrun starts; the others share batches."""

    def trained(self) -> Trained | None:
        """The network of --from; None without it, and where the run that goes on has started.

        Raises:
            ValueError: there is no such network, or it is of another family.
        """
        if not self.source or self._resumed() is not None:
            return None
        trained = open_trained(self.source, num_heads=self.num_heads or None)
        if trained.family != self.family:
            raise ValueError(
                f"family must be {trained.family} as in {self.source}, got {self.family}"
            )
        return trained

    def _resumed(self) -> RunConfig | None:
        # of blocks that one job trains side by side each has its own
        places = part_of(self.out, self.block), part_of(self.out, self.block or 0)
        there = [out for out in places if self.resume and (out / "config.json").exists()]
        return read_config(there[0]) if there else None

    def config(self, trained: Trained | None = None) -> RunConfig:
        """The run that the flags describe.

        Args:
            trained:  what `trained` gives
        Raises:
            ValueError: a flag has a value that it cannot have, or the data cannot be used.
        """
        entry, settings = family_named(self.family), asdict(self.trainer)
        if settings["decay_on"] is None:
            before = self._resumed()
            settings["decay_on"] = (before.trainer if before else TrainerConfig).decay_on
        trainer = TrainerConfig(**settings)
        if not self.data:
            raise ValueError("data must be digits or a path, got an empty text")
        sizes = {k: getattr(self, k) for k in ("patch", "dim", "depth", "num_heads", "length")}
        for name, size in sizes.items():
            check_number(name, size, 0, LARGEST)
        start, order = StartConfig(self.source, distill=self.distill), PartitionConfig.noise_order
        own = entry.model.preset(self.preset)
        if self.source:
            if self.preset:
                raise ValueError(f"preset must be left out with from, got {self.preset}")
            if (resumed := self._resumed()) is not None:
                own, order = resumed.model, resumed.partition.noise_order
                start = replace(start, digest=resumed.start.digest)
            elif trained is not None:
                own, start = trained.config, replace(start, digest=trained.digest)
                if trained.without_noise and self.objective == "blocks":
                    if (as_blocks := entry.start.as_blocks) is not None:
                        own = as_blocks(own)
                    order = entry.start.noise_order
        given = {k: v for k, v in sizes.items() if v}
        require_settings(f"a model of {self.family}", given, own)
        # a patch divides the images of the data, which those of the preset need not be
        of_images = {"patch": given.pop("patch")} if "patch" in given else {}
        model = self.noise.of(self.text.of(own.resized(given)))
        prior = self.prior.of(entry, model)
        model = model.fitted(model.find(self.data, convert=self.convert), of_images)
        if (resumed := self._resumed()) is not None:
            model = model.as_in(resumed.model)
        as_given = ("data", "convert", "stride", "label_drop", "mirror", "shift", "rand_augment")
        as_given += ("objective",)
        return RunConfig(
            family=self.family,
            model=replace(model, recompute=self.recompute),
            weighting=entry.weighting if self.weighting == "auto" else self.weighting,
            partition=self.partition.for_family(entry, self.objective, order),
            start=start,
            prior=prior,
            trainer=trainer,
            lora=LoraConfig(self.lora, self.lora_alpha, self.lora_targets, self.lora_base),
            **{name: getattr(self, name) for name in as_given},
        )

    def run(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a directory, got the file {self.out}")
        steps, shown = 0, ProgressBar("training", 0)

        def on_row(row: Row) -> None:
            nonlocal steps
            steps += 1
            shown.step(int(row["step"]) + 1, f"block {row['block']} loss {row['loss']:.4g}")

        with warnings.catch_warnings(), shown:
            warnings.showwarning = shown.warn
            trained = self.trained()
            config = self.config(trained)
            shown.total = config.trainer.steps * config.partition.num_blocks
            device = own_device(pick_device(self.device))
            apart = config.partition.sharing == "copies" and config.partition.num_blocks > 1
            blocks = config.partition.num_blocks if apart else None
            tensor = self.tensor_parallel
            with open_job(device, blocks=blocks, block=self.block, tensor=tensor) as job:
                if not job.is_first:
                    # it says what the others would say again
                    warnings.simplefilter("ignore")
                _warn_of_test(config)
                if self.lora and not self.source:
                    warnings.warn(RANDOM_BASE, stacklevel=2)
                if job.block is not None:
                    shown.total = config.trainer.steps
                try:
                    trainer = self._train(config, trained, device, job, on_row)
                except Stopped as stopped:
                    if job.is_first:
                        shown.warn(str(stopped))
                    sys.exit(os.EX_TEMPFAIL if self.requeue else 128 + stopped.signal)
        if job.is_first:
            self._say(trainer, steps)

    def _train(
        self,
        config: RunConfig,
        trained: Trained | None,
        device: torch.device,
        job: Job,
        on_row: Callable[[Row], None],
    ) -> Trainer:
        return train(
            config,
            self.out,
            device=device,
            trained=trained,
            resume=self.resume,
            data_changed=self.data_changed,
            save_every=self.save_every,
            keep=self.keep,
            save_async=self.save_async,
            threads=self.threads,
            workers=self.workers,
            track=trackers_named(self.track),
            job=job,
            on_row=on_row,
        )

    def _say(self, trainer: Trainer, steps: int) -> None:
        block = trainer.placements.job.block
        out = part_of(self.out, block)
        if not steps:
            print(f"nothing to do: all {trainer.total_steps} steps are trained already: {out}")
            return
        count = len(trainer.blocks)
        where = f"in {count} block{'s' * (count > 1)}" if block is None else f"of block {block}"
        print(f"trained {steps} steps {where}: {out}")
        if block is not None and count > 1:
            print(f"dbkernels merge {self.out} unites the blocks when all are trained")


def _warn_of_test(config: RunConfig) -> None:
    """Say at the start what evaluate will lack."""
    try:
        config.model.open(config.data, "test", convert=config.convert)
        return
    except ValueError as error:
        reason = str(error)
    warnings.warn(
        f"evaluate will have no test split of this data: {reason}; give it --data or --split train",
        stacklevel=2,
    )
