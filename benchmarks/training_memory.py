"""What a training step needs: measured on the device that runs it, or predicted for another."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import measure
import torch
from torch import Tensor
from training_case import TrainingCase, Way
from training_step import Steps

from dbkernels.memory.allocator import Target, target_of
from dbkernels.memory.measure import Prediction, record
from dbkernels.memory.tracker import CATEGORIES, Trace
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import of_preset
from dbkernels.training.partition import Block
from dbkernels.training.trainer import Trainer

Figures = dict[str, object]
BLOCK = 512  # bytes; the caching allocator gives multiples of it
NOT_SEEN = "compiled"  # by the tracker: the method whose ops it does not meet


# measured


def weigh(
    case: TrainingCase,
    way: Way,
    steps: Steps,
    others: Sequence[Trainer] = (),
    prediction: Figures | None = None,
) -> Figures:
    """Bytes and operations of a step of the costliest block, which has the most layers.

    It runs in the process that also times it. On a GPU the allocator begins empty but for what
    stays, and what other trainers have there of their own is left out of the peaks.

    Args:
        case:        what is trained
        way:         how
        steps:       that train it; their trainer moves on by a few
        others:      trainers that are there too
        prediction:  of the same step, where it is known already
    Raises:
        torch.OutOfMemoryError: the device does not hold the batch at once.
    """
    trainer = steps.trainer
    device, block = trainer.device, _costliest(trainer)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    step = partial(steps.step, block)
    steps.sweep()
    of_graphs = _reserved_by_graphs(steps)
    with _op_by_op(trainer):
        taken = measure.memory(step, inputs=_on_device(trainer), device=device)
        beside = _beside(trainer, others)
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        reserved = reserved if of_graphs is None else of_graphs
        figures = {
            "peak_allocated_bytes": taken.peak_bytes + taken.resident_bytes - beside,
            "peak_reserved_bytes": None if reserved is None else reserved - beside,
            "saved_bytes": _saved_bytes(trainer, step),
            "memory": "measured",
            "weighed": "in the process that times it",
            "beside_bytes": beside,
        }
        if trainer.micro_batch.size < case.batch:
            raise torch.OutOfMemoryError(f"a batch of {case.batch} does not fit")
        if way.method == NOT_SEEN:
            known = prediction or figures_of(case, target_of(device), way)["none"]
            return figures | {"by_category": None, "flops": known["flops"]}
        return figures | _told_apart(steps, figures["peak_allocated_bytes"])


def _beside(trainer: Trainer, others: Sequence[Trainer]) -> int:
    """Bytes on a GPU that other trainers have there of their own, and a step does not need."""
    if trainer.device.type == "cpu":
        return 0
    own = measure.storage_bytes(_on_device(trainer))
    theirs = [t for each in others for t in _on_device(each) if t.device == trainer.device]
    found = measure.storage_bytes(theirs)
    return sum(-(-size // BLOCK) * BLOCK for key, size in found.items() if key not in own)


@contextmanager
def _op_by_op(trainer: Trainer) -> Iterator[None]:
    """A replay allocates nothing: all but the reserved bytes are told by the same steps without."""
    cuda_graphs, trainer.cuda_graphs = trainer.cuda_graphs, None
    if cuda_graphs is not None:
        cuda_graphs.drop()
    try:
        yield
    finally:
        trainer.cuda_graphs = cuda_graphs


def _reserved_by_graphs(steps: Steps) -> int | None:
    """What the allocator has taken when each block's step is a graph."""
    if steps.trainer.cuda_graphs is None:
        return None
    steps.sweep()
    return torch.cuda.memory_reserved(steps.trainer.device)


def _costliest(trainer: Trainer) -> Block:
    return max(trainer.blocks, key=lambda block: len(block.layers))


def _on_device(trainer: Trainer) -> list[Tensor]:
    models = trainer.blocks
    state = [t for group in trainer.groups.values() for t in group.optimizer_tensors().values()]
    return [*models.parameters(), *models.buffers(), *state]


def _saved_bytes(trainer: Trainer, step: measure.Call) -> int:
    """What is there when the forward of a step ends, and was not when it began."""
    objective, kept = trainer.objective, []

    def weighed(*arguments) -> Tensor:
        with _growth(trainer.device, kept):
            return objective(*arguments)

    trainer.objective = weighed
    step()
    trainer.objective = objective
    return sum(kept)


@contextmanager
def _growth(device: torch.device, found: list[int]) -> Iterator[None]:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield
        found.append(torch.cuda.memory_allocated(device) - before)
        return
    with measure.allocations() as changes:
        yield
    found.append(sum(changes))


def _told_apart(steps: Steps, peak_bytes: int) -> Figures:
    """The peak by category, and the operations of a step, averaged over the blocks."""
    trainer, traces = steps.trainer, {}
    for block in trainer.blocks:
        if len(block.layers) not in traces:
            traces[len(block.layers)] = _trace(steps, block)
    flops = sum(traces[len(block.layers)].flops for block in trainer.blocks)
    peak = traces[max(traces)].peak()
    # what is left was allocated within ops, where the tracker does not look
    inside = max(peak_bytes - peak.total_bytes, 0)
    parts = dict(zip(CATEGORIES, peak.by_category, strict=True))
    parts["workspaces"] += inside
    return {"by_category": parts, "flops": flops // len(trainer.blocks)}


def _trace(steps: Steps, block: Block) -> Trace:
    trainer = steps.trainer
    return record(
        partial(steps.step, block),
        model=trainer.blocks,
        optimizers=[group.optimizer for group in trainer.groups.values()],
        inputs=(),
        device=trainer.device,
    )


# predicted


def predicted(
    case: TrainingCase, every: Sequence[Way], target: Target
) -> Iterator[tuple[Way, Figures]]:
    """Each way and its figures, in order, as they are found."""
    alike: dict[Way, list[Way]] = {}
    for way in every:
        alike.setdefault(with_all(way), []).append(way)
    with _mapping(len(alike)) as mapped:
        found = mapped(partial(figures_of, case, target), alike)
        for same, figures in zip(alike.values(), found, strict=True):
            for way in same:
                yield way, figures[way.offload]


@contextmanager
def _mapping(count: int) -> Iterator[Callable[..., Iterator[dict[str, Figures]]]]:
    """What maps so many, in processes where they are several."""
    processes = min(os.cpu_count() or 1, count)
    if processes == 1:
        yield map
        return
    # a forked process would inherit torch's threads without their locks
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def with_all(way: Way) -> Way:
    """The way of which a dry run tells both what all blocks need and what one needs."""
    return replace(way, offload="none", launch="ops")


def predict(case: TrainingCase, way: Way, target: Target) -> dict[str, Prediction]:
    """By what is on the device: all blocks, or one."""
    recipe = replace(
        of_preset(case.family, case.preset),
        batch_size=case.batch,
        autocast=case.dtype == "autocast",
        method=way.method,
        num_blocks=way.num_blocks,
        recompute=way.recompute,
        budget=way.budget,
        optimizer_in_backward=way.optimizer_in_backward,
        device=target,
    )
    return dry_run(recipe)


def figures_of(case: TrainingCase, target: Target, way: Way) -> dict[str, Figures]:
    """As `predict`, without the trace: that is large, and stays in the process that made it."""
    return {place: _figures(way, of) for place, of in predict(case, way, target).items()}


def _figures(way: Way, prediction: Prediction) -> Figures:
    # what a selective checkpoint keeps is in no hook's sight
    saved = None if way.method == "selective" else prediction.saved_bytes
    return {
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "saved_bytes": saved,
        "memory": "predicted",
        "weighed": None,
        "beside_bytes": None,
        "by_category": prediction.by_category,
        "flops": prediction.flops,
    }
