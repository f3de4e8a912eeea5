"""A run: one configuration, one directory with its log and its checkpoints.

<run>/config.json    everything that is needed to build the run again
<run>/log.jsonl      one row per step
<run>/checkpoints/   safetensors and JSON
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from dbkernels.data.augment import drop_labels, mirror, shift
from dbkernels.data.images import ImageData, open_data
from dbkernels.diffusion.gaussian import LogNormal, Scheme
from dbkernels.models import FAMILIES, DiTConfig, ViTConfig
from dbkernels.models.family import Batch
from dbkernels.models.stem_and_head import compile_stem_and_head
from dbkernels.ops.philox import Draw
from dbkernels.training import checkpoint
from dbkernels.training.log import RunLog
from dbkernels.training.objective import Weighting, gaussian_step
from dbkernels.training.partition import Block, partition
from dbkernels.training.pending import Row, Rows
from dbkernels.training.sharing import BlockModels, load_weights
from dbkernels.training.trainer import Augment, Trainer
from dbkernels.training.trainer_config import TrainerConfig
from dbkernels.whole_file import write_whole

# settings of the trainer that a run may change on its way, for its bits stay the same; without
# clipping from its start it may also move the optimizer into the backward
PLACEMENT = ("offload", "offload_dir", "prefetch", "optimizer_in_backward", "cuda_graphs")
VERSION = 1  # of config.json and of what a checkpoint holds
MODEL_CONFIGS = {"vit": ViTConfig, "dit": DiTConfig}


@dataclass(frozen=True)
class PartitionConfig:
    """How the layers and the noise are cut."""

    num_blocks: int = 3
    """Number of blocks; 1 trains end to end."""
    split: str = ""
    """Layers per block, comma separated, the noisiest block first; empty splits evenly."""
    scheme: Scheme = "equal_probability"
    """How the noise levels are cut."""
    gamma: float = 0.05
    """Overlap of neighbouring blocks, as a share of each one's width in ln sigma."""

    def blocks(self, depth: int, prior: LogNormal) -> tuple[Block, ...]:
        """The blocks of a model with `depth` layers."""
        return partition(
            depth,
            self.num_blocks,
            prior,
            split=self._sizes() if self.split else None,
            scheme=self.scheme,
            gamma=self.gamma,
        )

    def _sizes(self) -> list[int]:
        try:
            return [int(size) for size in self.split.split(",")]
        except ValueError:
            raise ValueError(
                f"split must be whole numbers with commas between, got {self.split}"
            ) from None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    family: str
    model: ViTConfig | DiTConfig
    data: str
    """See `open_data`."""
    weighting: Weighting
    """Weight of the noise levels in the loss."""
    label_drop: float
    """Share of labels dropped for guidance; families without "no label" need 0."""
    mirror: bool
    """Whether images are mirrored at random."""
    shift: int
    """Pixels by which images are moved at random, at most."""
    partition: PartitionConfig
    prior: LogNormal
    trainer: TrainerConfig

    def __post_init__(self):
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}")
        if self.weighting == "published" and self.trainer.accumulate > 1:
            raise ValueError(
                "accumulate must be 1 with the published weighting, which is no mean over samples, "
                f"got {self.trainer.accumulate}"
            )
        if self.label_drop and self.family != "dit":
            raise ValueError(f"label_drop must be 0 for {self.family}, got {self.label_drop}")

    def build(self, device: torch.device | str) -> BlockModels:
        """New models, initialised from the run's seed, on a device."""
        blocks = self.partition.blocks(self.model.depth, self.prior)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            model = FAMILIES[self.family](self.model)
        # fake tensors cannot be moved, not even to where they are
        if next(model.parameters()).device != torch.device(device):
            model = model.to(device)
        return BlockModels(model, blocks, self.trainer.sharing)

    def home(self, device: torch.device | str) -> torch.device | str:
        """Where models are built that train on a device: where all of their blocks have room."""
        return "cpu" if self.trainer.offload != "none" else device

    def trainer_on(self, device: torch.device | str, data: ImageData) -> Trainer:
        """A trainer at its first step."""
        return self.trainer_of(self.build(self.home(device)), data, device=device)

    def trainer_of(
        self, models: BlockModels, data: ImageData, *, device: torch.device | str | None = None
    ) -> Trainer:
        """A trainer at its first step, of models that `build` gave; `Trainer` says the rest."""
        objective = partial(
            gaussian_step,
            prior=self.prior,
            weighting=self.weighting,
            sigma_data=self.model.sigma_data,
        )
        augment = self._augment()
        if self.trainer.compile_stem_and_head:
            for model in (models.model, *models.copies):
                compile_stem_and_head(model, device or next(model.parameters()).device)
        return Trainer(models, data, objective, self.trainer, augment=augment, device=device)

    def _augment(self) -> Augment | None:
        changes: list[Augment] = []
        if self.shift:
            changes.append(partial(shift, pixels=self.shift))
        if self.mirror:
            changes.append(mirror)
        if self.label_drop:
            null = self.model.num_classes
            changes.append(partial(drop_labels, share=self.label_drop, null=null))

        def augment(batch: Batch, draw: Draw) -> Batch:
            for change in changes:
                batch = change(batch, draw)
            return batch

        return augment if changes else None


def write_config(config: RunConfig, directory: Path) -> None:
    """Write config.json, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(
        directory / "config.json",
        json.dumps({"version": VERSION, **asdict(config)}, indent=2) + "\n",
    )


def read_config(directory: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ValueError: the directory holds no run, or one of another version.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"a run's directory must hold config.json, got none in {directory}")
    try:
        saved = json.loads(path.read_text())
        _require_version(saved.pop("version", None), path)
        nested = {
            "model": MODEL_CONFIGS[saved["family"]],
            "partition": PartitionConfig,
            "prior": LogNormal,
            "trainer": TrainerConfig,
        }
        return RunConfig(**{k: nested[k](**v) if k in nested else v for k, v in saved.items()})
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"config.json must be one that this version wrote, got {error}") from None


def _require_version(version: object, path: Path) -> None:
    if version != VERSION:
        raise ValueError(f"{path} must have version {VERSION}, got {version}")


def train(
    config: RunConfig,
    directory: Path,
    *,
    device: torch.device | str,
    resume: str = "",
    save_every: int = 0,
    tensorboard: bool = False,
    on_step: Callable[[Row], None] = lambda row: None,
) -> Trainer:
    """Train a run to its end, logging every step.

    Args:
        config:       of the run
        directory:    of the run; a new run needs one that holds none
        device:       to train on
        resume:       "latest", or the path of a checkpoint of this run; empty starts anew
        save_every:   steps between checkpoints; 0 saves the last one alone
        tensorboard:  whether to log there too
        on_step:      called with each row of the log, when the next step was launched
    Returns:
        The trainer, at its last step. Where blocks were offloaded, all is on the host again.
    Raises:
        ValueError: a setting is wrong, the directory holds another run or one that still goes on,
                    or a checkpoint cannot be used. No file of a run is touched then.
        FloatingPointError: a loss is not finite; the last checkpoint stays.
    """
    if save_every < 0:
        raise ValueError(f"save_every must be at least 0, got {save_every}")
    trainer = config.trainer_on(device, open_data(config.data, "train", config.model.num_classes))
    if resume:
        restore(trainer, config, directory, resume)
    elif checkpoint.latest(directory / "checkpoints"):
        raise ValueError(f"{directory} must hold no run yet, got one; resume it or choose another")
    log = RunLog(directory, first_step=trainer.step, tensorboard=tensorboard)

    def take(row: Row) -> None:
        log.write(row)
        on_step(row)

    try:
        write_config(config, directory)
        with Rows(take) as rows:
            while trainer.step < trainer.total_steps:
                rows.add(trainer.launch(trainer.next_block()))
                if trainer.step == trainer.total_steps or (
                    save_every and not trainer.step % save_every
                ):
                    # a step that was not finite raises here, before it can be saved
                    rows.settle()
                    _save(trainer, config, directory)
    finally:
        log.close()
        trainer.close()
    return trainer


def _save(trainer: Trainer, config: RunConfig, directory: Path) -> None:
    state = {"version": VERSION, "config": asdict(config), "counters": trainer.counters()}
    checkpoint.save(directory / "checkpoints", trainer.step, trainer.tensors(), state)


def restore(trainer: Trainer, config: RunConfig, directory: Path, which: str) -> None:
    """Set a trainer to a checkpoint of its own run, "latest" or a path."""
    path = checkpoint_path(directory, which)
    tensors, state = checkpoint.load(path)
    _require_same_config(state, config, path)
    trainer.restore(tensors, state["counters"])


def _require_same_config(state: dict, config: RunConfig, path: Path) -> None:
    """Refuse a checkpoint of another version or of other settings; some settings move no number."""
    _require_version(state.get("version"), path)
    saved, current = state["config"], asdict(config)
    same = {key: current["trainer"][key] for key in PLACEMENT}
    saved = {**saved, "trainer": {**saved["trainer"], **same}}
    checkpoint.require_same_config(saved, current, path)


def checkpoint_path(directory: Path, which: str) -> Path:
    """The newest checkpoint of a run for "latest", else the path itself.

    Raises:
        ValueError: the run has no checkpoint.
    """
    if which != "latest":
        return Path(which)
    path = checkpoint.latest(directory / "checkpoints")
    if path is None:
        raise ValueError(f"{directory} must hold a checkpoint, got none")
    return path


def load_run(
    directory: Path, *, which: str = "latest", averaged: bool = True, device: torch.device | str
) -> tuple[RunConfig, BlockModels]:
    """A run's configuration and its trained models, ready to sample and evaluate.

    Args:
        directory:  of the run
        which:      "latest", or the path of a checkpoint
        averaged:   whether to take the moving average of the weights where the run kept one
        device:     to load to
    Raises:
        ValueError: there is no such run or checkpoint, or it is damaged.
    """
    config = read_config(directory)
    tensors, state = checkpoint.load(path := checkpoint_path(directory, which))
    _require_same_config(state, config, path)
    models = config.build(device)
    load_weights(models, tensors["model"])
    if averaged:
        load_weights(models, tensors.get("ema", {}))
    return config, models.eval()
