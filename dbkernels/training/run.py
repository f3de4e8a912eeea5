"""A run: one configuration, one directory with its log and its checkpoints.

<run>/config.json    everything that is needed to build the run again
<run>/tokenizer.json of text: what makes its tokens, where the data have one
<run>/log.jsonl      one row per step
<run>/checkpoints/   safetensors and JSON
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dbkernels.models.start import Trained
from dbkernels.settings import check_choice, check_number
from dbkernels.training import checkpoint
from dbkernels.training.checkpoint.shard import Shard
from dbkernels.training.diffusion_blocks import DiffusionBlocks, load_weights
from dbkernels.training.log import RunLog
from dbkernels.training.parallel.job import ALONE, Job
from dbkernels.training.pending import Row
from dbkernels.training.run_config import (
    VERSION,
    RunConfig,
    config_of,
    read_config,
    write_config,
)
from dbkernels.training.run_steps import Saving, Shown, take_steps
from dbkernels.training.same_run import (
    Conditions,
    DataChanged,
    conditions,
    conditions_of,
    require_same_config,
    require_same_data,
    require_same_schedule,
)
from dbkernels.training.saved import require_tensors
from dbkernels.training.threads import MOST_THREADS, cpu_threads, fastest_for
from dbkernels.training.tracking.registry import TrackerName, require_trackers
from dbkernels.training.trained import distillation, kept, start_weights
from dbkernels.training.trained import keep as keep_trained
from dbkernels.training.trainer import Trainer

# settings of the trainer that a run may change on its way, for its bits stay the same; without
# clipping from its start it may also move the optimizer into the backward. What processes share
# moves the last bits, as their number does, which is no setting
PLACEMENT = (
    "shard",
    "offload",
    "offload_dir",
    "prefetch",
    "offload_activations",
    "optimizer_in_backward",
    "cuda_graphs",
)


def train(
    config: RunConfig,
    directory: Path,
    *,
    device: torch.device | str,
    trained: Trained | None = None,
    resume: str = "",
    data_changed: DataChanged = "refuse",
    save_every: int = 0,
    keep: int = 2,
    save_async: bool = False,
    threads: int = 0,
    workers: int = 0,
    track: Sequence[TrackerName] = (),
    job: Job = ALONE,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Trainer:
    """Train a run to its end, logging every step.

    Where a job trains one block alone, its run is <directory>/block<index>, and `merge` makes one
    run of all. The first process of a job logs and says what happens; all save.

    A run that was interrupted, however often, ends with the bits of one that was not, where all
    that `conditions` names is the same; a warning says what is another.

    Args:
        config:        of the run
        directory:     of the run; a new run needs one that holds none
        device:        to train on
        trained:       the network that a new run starts from, where the configuration names one;
                       a run that is resumed needs none
        resume:        "latest", or the path of a checkpoint of this run; empty starts anew. More
                       steps may be asked for where the earlier ones are the same for it
        data_changed:  ok goes on with data that are not those of the checkpoint
        save_every:    steps between checkpoints; 0 saves the last one alone
        keep:          checkpoints that are kept, the newest; where one is damaged the one before
                       it serves
        threads:       of the CPU, where it trains; 0 is what the run had before, and for a new run
                       what a few trials are fastest with
        workers:       processes that read the samples of coming steps; of no effect on any bit
        track:         trackers that show the rows too, by name
        job:           this process among those that train the run, or one block of it
        on_row:        called with each row of the log, when the next step was launched
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
    check_number("threads", threads, 0, MOST_THREADS)
    check_choice("data_changed", data_changed, get_args(DataChanged))
    require_trackers(track)
    job.agree("the configuration of the run", asdict(config))
    told = {"save_every": save_every, "keep": keep, "save_async": save_async}
    for name, value in told.items():
        job.agree(name, value)
    directory = part_of(directory, job.block)
    data = config.model.open(config.data, "train", convert=config.convert, stride=config.stride)
    root, distills = directory / "checkpoints", bool(config.start.distill)
    if not resume:
        weights = start_weights(config, trained)
    else:
        weights = kept(directory, config.start.digest) if distills else None
    loss = distillation(config, weights, device) if distills and weights is not None else None
    start = None if resume else weights
    trainer = config.trainer_on(device, data, start, loss, workers=workers, job=job)
    before: Conditions = {}
    if resume:
        path, tensors, state, saved = load_checkpoint(config, directory, resume)
        trainer.restore(tensors, state["counters"])
        turn = trainer.block_order.steps_per_swap
        blocks, step = len(trainer.blocks.trained), trainer.step
        require_same_schedule(
            saved.trainer, config.trainer, blocks=blocks, turn=turn, step=step, path=path
        )
        before = conditions_of(state, path)
    elif checkpoint.latest(root):
        raise ValueError(f"{directory} must hold no run yet, got one; resume it or choose another")
    threads = threads or int(before.get("threads", 0))
    if not threads:
        # processes that run side by side share the machine as whoever started them says
        threads = fastest_for(trainer) if job.group is None else torch.get_num_threads()
    # where each has a disk of its own, one may have an older checkpoint, or other data
    job.agree("the checkpoint to go on from", trainer.step)
    with cpu_threads(threads):
        now = conditions(data, trainer.device, job.count)
        job.agree("the data", now.get("data"))
        if resume:
            moved = saved.data != config.data
            require_same_data(before, now, moved=moved, path=path, data_changed=data_changed)
        if trainer.step < trainer.total_steps:
            every = [t for tensors in trainer.tensors().values() for t in tensors.values()]
            job.on_first(partial(checkpoint.check_root, root, sum(map(_whole_bytes, every))))
        if distills and not resume and weights is not None:
            digest = config.start.digest
            job.on_first(partial(keep_trained, directory, weights, digest))
        del weights
        log = _open_log(directory, trainer, track, config)
        state = {"version": VERSION, "config": asdict(config), "conditions": now}
        saving = Saving(trainer, root, state, keep, is_async=save_async)
        try:
            job.on_first(partial(_describe, config, directory))
            take_steps(trainer, saving, save_every, Shown(log, now.get("threads"), on_row).take)
        finally:
            if log is not None:
                log.close(finished=saving.is_finished)
            trainer.close()
    return trainer


def _open_log(
    directory: Path, trainer: Trainer, track: Sequence[TrackerName], config: RunConfig
) -> RunLog | None:
    """The log of a run, on the first process of its job."""
    opened: list[RunLog] = []

    def open_log() -> None:
        settings = asdict(config)
        opened.append(RunLog(directory, first_step=trainer.step, track=track, config=settings))

    trainer.placements.job.on_first(open_log)
    return opened[0] if opened else None


def _whole_bytes(value: Tensor | Shard) -> int:
    """Of a tensor in a checkpoint, whoever writes how much of it."""
    if isinstance(value, Tensor):
        return value.nbytes
    return math.prod(value.shape) * value.local.itemsize


def _describe(config: RunConfig, directory: Path) -> None:
    write_config(config, directory)
    config.model.keep(config.data, directory)


def part_of(directory: Path, block: int | None) -> Path:
    """Directory of what a job trains of a run: one block, or all of it."""
    return directory if block is None else directory / f"block{block}"


def load_checkpoint(
    config: RunConfig, directory: Path, which: str
) -> tuple[Path, checkpoint.Tensors, dict, RunConfig]:
    """A checkpoint of a run, "latest" or a path; its settings are those of the run.

    Where its data lie, and how long the run is, may be another: `train` looks at these.

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
    saved = config_of(state["config"], state.get("version"), path)
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
    _, tensors, state, _ = load_checkpoint(config, directory, which)
    blocks = config.build(device)
    trained, every = set(state["counters"].get("groups", ())), set(blocks.groups())
    if trained < every:
        raise ValueError(
            f"{directory} must hold all blocks of a run, got {', '.join(sorted(trained))} alone: "
            "merge unites them"
        )
    require_tensors(tensors.get("model", {}), dict(blocks.named_parameters()), "model")
    load_weights(blocks, tensors["model"])
    if averaged:
        load_weights(blocks, tensors.get("ema", {}))
    return config, blocks.eval()
