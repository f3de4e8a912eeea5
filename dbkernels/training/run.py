"""A run: one configuration, one directory with its log and its checkpoints.

<run>/config.json    everything that is needed to build the run again
<run>/log.jsonl      one row per step
<run>/checkpoints/   safetensors and JSON
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from dbkernels.data.augment import drop_labels, mirror, shift
from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Batch, Data, open_data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.process import Process, Scheme
from dbkernels.models.family import Weighting
from dbkernels.models.registry import ModelConfig, family_named
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice, check_number
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks, Sharing, load_weights
from dbkernels.training.log import RunLog
from dbkernels.training.pending import Row, Rows
from dbkernels.training.same_run import (
    Conditions,
    DataChanged,
    conditions,
    require_same_config,
    require_same_data,
    require_same_schedule,
)
from dbkernels.training.saved import require_tensors, require_types
from dbkernels.training.stop import Stopped, StopSignals
from dbkernels.training.trainer import Augment, Trainer
from dbkernels.training.trainer_config import TrainerConfig
from dbkernels.whole_file import make_directory, write_whole

# settings of the trainer that a run may change on its way, for its bits stay the same; without
# clipping from its start it may also move the optimizer into the backward
PLACEMENT = ("offload", "offload_dir", "prefetch", "optimizer_in_backward", "cuda_graphs")
VERSION = 3  # of config.json and of what a checkpoint holds; every earlier one is read


@dataclass(frozen=True)
class PartitionConfig:
    """How the layers and the noise are cut, and what the blocks share."""

    num_blocks: int = 3
    """Number of blocks; 1 trains end to end."""
    layers: str = ""
    """Indices of layers in running order, comma separated; they may repeat. Empty: each once."""
    split: str = ""
    """Layers per block, comma separated, the block of the most noise first; empty: evenly."""
    scheme: Scheme = "equal_probability"
    """How the range of noise is cut into intervals."""
    gamma: float = 0.05
    """Overlap of neighbouring blocks, as a share of each one's width in ln sigma."""
    sharing: Sharing = "joint"
    """joint: every block trains the same stem and head. copies: each block has its own."""

    def of(self, model: nn.Module, process: Process, weighting: Weighting) -> DiffusionBlocks:
        """The blocks of a model; `DiffusionBlocks` says the rest."""
        numbers = {name: _whole_numbers(name, getattr(self, name)) for name in ("layers", "split")}
        settings = asdict(self) | numbers
        return DiffusionBlocks(model, process=process, weighting=weighting, **settings)


def _whole_numbers(name: str, text: str) -> list[int] | None:
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, got {text}") from None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    family: str
    """A key of `FAMILIES`."""
    model: ModelConfig
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
    convert: Convert = "none"
    """Channels of the images of a folder, as `open_data` has it."""

    def __post_init__(self):
        check_choice("convert", self.convert, get_args(Convert))
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
        check_number("shift", self.shift, 0)
        if self.weighting == "published" and self.trainer.accumulate > 1:
            raise ValueError(
                "accumulate must be 1 with the published weighting, which is no mean over samples, "
                f"got {self.trainer.accumulate}"
            )
        if self.label_drop and family_named(self.family).null_label is None:
            raise ValueError(f"label_drop must be 0 for {self.family}, got {self.label_drop}")

    def build(self, device: torch.device | str) -> DiffusionBlocks:
        """New blocks, initialised from the run's seed, on a device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            model = family_named(self.family).model(self.model)
        # fake tensors cannot be moved, not even to where they are
        if next(model.parameters()).device != torch.device(device):
            model = model.to(device)
        return self.partition.of(model, self.prior, self.weighting)

    def home(self, device: torch.device | str) -> torch.device | str:
        """Where models are built that train on a device: where all of their blocks have room."""
        return "cpu" if self.trainer.offload != "none" else device

    def trainer_on(self, device: torch.device | str, data: Data) -> Trainer:
        """A trainer at its first step."""
        return self.trainer_of(self.build(self.home(device)), data, device=device)

    def trainer_of(
        self, blocks: DiffusionBlocks, data: Data, *, device: torch.device | str | None = None
    ) -> Trainer:
        """A trainer at its first step, of blocks that `build` gave; `Trainer` says the rest."""
        settings = asdict(self.trainer)
        return Trainer(blocks, data, **settings, augment=self._augment(), device=device)

    def _augment(self) -> Augment | None:
        changes: list[Augment] = [partial(shift, pixels=self.shift)] if self.shift else []
        changes += [mirror] if self.mirror else []
        if self.label_drop:
            null = family_named(self.family).null_label(self.model)
            changes.append(partial(drop_labels, share=self.label_drop, null=null))

        def augment(batch: Batch, draw: Draw) -> Batch:
            for change in changes:
                batch = change(batch, draw)
            return batch

        return augment if changes else None


def write_config(config: RunConfig, directory: Path) -> None:
    """Write config.json, whole or not at all."""
    make_directory(directory)
    text = json.dumps({"version": VERSION, **asdict(config)}, indent=2)
    write_whole(directory / "config.json", f"{text}\n")


def read_config(directory: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ValueError: the directory holds no run, or one of another version.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"a run's directory must hold config.json, got none in {directory}")
    try:
        saved = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be the JSON of a run, got {error}") from None
    return _config(saved, saved.pop("version", None), path)


def _config(saved: dict, version: object, path: Path) -> RunConfig:
    """The configuration in a file of any version that there was."""
    if version not in range(1, VERSION + 1):
        raise ValueError(f"{path} must have a version from 1 to {VERSION}, got {version}")
    try:
        if version == 1:
            # what blocks share was a setting of the trainer
            trainer = dict(saved["trainer"])
            partition = {**saved["partition"], "sharing": trainer.pop("sharing")}
            saved = {**saved, "trainer": trainer, "partition": partition}
        model = family_named(saved["family"]).config.stored(saved["model"], version)
        saved = {**saved, "model": model}
        nested = {
            "partition": PartitionConfig,
            "prior": LogNormal,
            "trainer": TrainerConfig,
        }
        config = RunConfig(**{k: nested[k](**v) if k in nested else v for k, v in saved.items()})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold the configuration of a run, got {error}") from None
    try:
        require_types(config)
    except ValueError as error:
        raise ValueError(f"{path} must hold the configuration of a run: {error}") from None
    return config


def train(
    config: RunConfig,
    directory: Path,
    *,
    device: torch.device | str,
    resume: str = "",
    data_changed: DataChanged = "refuse",
    save_every: int = 0,
    keep: int = 2,
    tensorboard: bool = False,
    on_step: Callable[[Row], None] = lambda row: None,
) -> Trainer:
    """Train a run to its end, logging every step.

    Args:
        config:        of the run
        directory:     of the run; a new run needs one that holds none
        device:        to train on
        resume:        "latest", or the path of a checkpoint of this run; empty starts anew. More
                       steps may be asked for where the earlier ones are the same for it
        data_changed:  ok goes on with data that are not those of the checkpoint
        save_every:    steps between checkpoints; 0 saves the last one alone
        keep:          checkpoints that are kept, the newest; where one is damaged the one before
                       it serves
        tensorboard:   whether to log there too
        on_step:       called with each row of the log, when the next step was launched
    Returns:
        The trainer, at its last step. Where blocks were offloaded, all is on the host again.
    Raises:
        ValueError: a setting is wrong, the directory holds another run or one that still goes on,
                    or a checkpoint cannot be used or written. No file of a run is touched then.
        FloatingPointError: a loss is not finite, or a weight that is to be saved; the last
                    checkpoint stays.
        Stopped: a signal asked the run to end; what was trained is saved, as after other errors.
    """
    check_number("save_every", save_every, 0)
    check_number("keep", keep, 1)
    check_choice("data_changed", data_changed, get_args(DataChanged))
    data = open_data(config.data, "train", config.model.num_classes, convert=config.convert)
    trainer, root = config.trainer_on(device, data), directory / "checkpoints"
    now = conditions(data, trainer.device)
    if resume:
        restore(trainer, config, directory, resume, now, data_changed=data_changed)
    elif checkpoint.latest(root):
        raise ValueError(f"{directory} must hold no run yet, got one; resume it or choose another")
    if trainer.step < trainer.total_steps:
        every = [t for tensors in trainer.tensors().values() for t in tensors.values()]
        checkpoint.check_root(root, sum(tensor.nbytes for tensor in every))
    log = RunLog(directory, first_step=trainer.step, tensorboard=tensorboard)

    saved, told = trainer.step, True

    def take(row: Row) -> None:
        nonlocal told
        log.write(row)
        if told:
            # where it fails, it is not called on the way out
            told = False
            on_step(row)
            told = True

    def save(rows: Rows) -> None:
        nonlocal saved
        # a step that was not finite raises here, before it can be saved
        rows.settle()
        if trainer.step > saved:
            state = {"version": VERSION, "config": asdict(config), "conditions": now}
            state["counters"] = trainer.counters()
            # the loss of the last step says nothing of what its update made
            options = {"keep": keep, "read": trainer.read, "finite": ("model", "ema")}
            checkpoint.save(root, trainer.step, trainer.tensors(), state, **options)
            saved = trainer.step

    try:
        write_config(config, directory)
        with StopSignals() as stop, Rows(take) as rows:
            try:
                while trainer.step < trainer.total_steps and not stop.asked:
                    rows.add(trainer.launch(trainer.next_block()))
                    if save_every and not trainer.step % save_every:
                        save(rows)
            except BaseException as error:
                # a step that was cut short has moved nothing, unless its backward had; and whoever
                # goes on from before a loss that is not finite comes to it again
                early = config.trainer.optimizer_in_backward
                if not early and not isinstance(error, FloatingPointError):
                    _save_at_last(partial(save, rows))
                raise
            save(rows)
            if trainer.step < trainer.total_steps:
                raise Stopped(stop.asked, trainer.step, trainer.total_steps)
    finally:
        log.close()
        trainer.close()
    return trainer


def _save_at_last(save: Callable[[], None]) -> None:
    """Save on the way out of an error, which is told whether or not this comes off."""
    try:
        save()
    except Exception as error:
        warnings.warn(f"steps since the last checkpoint are lost: {error}", stacklevel=2)


def restore(
    trainer: Trainer,
    config: RunConfig,
    directory: Path,
    which: str,
    now: Conditions,
    *,
    data_changed: DataChanged = "refuse",
) -> None:
    """Set a trainer to a checkpoint of its own run, "latest" or a path.

    Args:
        trainer:       at its first step
        config:        of the run
        directory:     of the run
        which:         "latest", or the path of a checkpoint
        now:           conditions under which it goes on
        data_changed:  as for `train`
    Raises:
        ValueError: there is no such checkpoint, or it is damaged, or of other settings or data.
    """
    path, tensors, state, saved = _load(config, directory, which)
    counters = state["counters"]
    require_same_schedule(
        saved.trainer,
        config.trainer,
        blocks=len(trainer.blocks),
        turn=counters["steps_per_swap"],
        step=counters["step"],
        path=path,
    )
    moved, before = saved.data != config.data, state.get("conditions", {})
    require_same_data(before, now, moved=moved, path=path, data_changed=data_changed)
    trainer.restore(tensors, counters)


def _load(
    config: RunConfig, directory: Path, which: str
) -> tuple[Path, checkpoint.Tensors, dict, RunConfig]:
    """A checkpoint of a run, "latest" or a path; its settings are those of the run.

    Where its data lie, and how long the run is, may be another: `restore` looks at these.

    Returns:
        Its directory, what it holds, and the configuration in it.
    Raises:
        ValueError: the run has no checkpoint, or one of other settings, or it is damaged.
    """
    if which == "latest":
        if checkpoint.latest(directory / "checkpoints") is None:
            raise ValueError(f"{directory} must hold a checkpoint, got none")
        path, tensors, state = checkpoint.load_latest(directory / "checkpoints")
    else:
        tensors, state = checkpoint.load(path := Path(which))
    for name in ("config", "counters"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"{path} must be the checkpoint of a run, got one without {name}")
    saved = _config(state["config"], state.get("version"), path)
    # some settings move no number
    same = {key: getattr(config.trainer, key) for key in (*PLACEMENT, "steps")}
    alike = replace(saved, data=config.data, trainer=replace(saved.trainer, **same))
    require_same_config(asdict(alike), asdict(config), path)
    return path, tensors, state, saved


def load_run(
    directory: Path, *, which: str = "latest", averaged: bool = True, device: torch.device | str
) -> tuple[RunConfig, DiffusionBlocks]:
    """A run's configuration and its trained blocks, ready to sample and evaluate.

    Args:
        directory:  of the run
        which:      "latest", or the path of a checkpoint
        averaged:   whether to take the moving average of the weights where the run kept one
        device:     to load to
    Raises:
        ValueError: there is no such run or checkpoint, or it is damaged.
    """
    config = read_config(directory)
    _, tensors, *_ = _load(config, directory, which)
    blocks = config.build(device)
    require_tensors(tensors.get("model", {}), dict(blocks.named_parameters()), "model")
    load_weights(blocks, tensors["model"])
    if averaged:
        load_weights(blocks, tensors.get("ema", {}))
    return config, blocks.eval()
