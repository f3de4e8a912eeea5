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
from training_step import Steps, make_trainer

from dbkernels.memory.measure import record
from dbkernels.memory.predict import Prediction
from dbkernels.memory.trace import CATEGORIES, Trace
from dbkernels.memory.workspace import Target, target_of
from dbkernels.training.partition import Block
from dbkernels.training.rehearsal import rehearse
from dbkernels.training.trainer import Trainer

Figures = dict[str, object]
NOT_SEEN = "compiled"  # by the tracker: the method whose ops it does not meet


# measured


def weigh(case: TrainingCase, way: Way, trainer: Trainer) -> Figures:
    """Bytes and operations of a step of the costliest block, which has the most layers.

    Args:
        case:     what is trained
        way:      how; on a GPU in a process of its own
        trainer:  that trains it; it moves on by a few steps
    Raises:
        torch.OutOfMemoryError: the device does not hold the batch at once.
    """
    device, block = trainer.device, _costliest(trainer)
    step = partial(trainer.step_block, block)
    Steps(trainer).sweep()
    of_graphs = _reserved_by_graphs(trainer)
    taken = measure.memory(step, inputs=_resident(trainer), device=device)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    figures = {
        "peak_allocated_bytes": taken.peak_bytes + taken.resident_bytes,
        "peak_reserved_bytes": reserved if of_graphs is None else of_graphs,
        "saved_bytes": _saved_bytes(trainer, step),
        "memory": "measured",
    }
    if trainer.micro_batch.size < case.batch:
        raise torch.OutOfMemoryError(f"a batch of {case.batch} does not fit")
    return figures | _told_apart(case, way, trainer, figures["peak_allocated_bytes"])


def _reserved_by_graphs(trainer: Trainer) -> int | None:
    """What the allocator has taken when each block's step is a graph; from here on none is.

    A replay allocates nothing, so all else is told by the same steps op by op.
    """
    if trainer.graphs is None:
        return None
    Steps(trainer).sweep()
    reserved = torch.cuda.memory_reserved(trainer.device)
    trainer.graphs.drop()
    trainer.graphs = None
    return reserved


def _costliest(trainer: Trainer) -> Block:
    return max(trainer.blocks, key=lambda block: len(block.layers))


def _resident(trainer: Trainer) -> list[Tensor]:
    models = trainer.models
    state = [t for part in trainer.parts.values() for t in part.optimizer_tensors().values()]
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


def _told_apart(case: TrainingCase, way: Way, trainer: Trainer, peak_bytes: int) -> Figures:
    """The peak by category, and the operations of a step, averaged over the blocks."""
    if way.method == NOT_SEEN:
        flops = predict(case, way, target_of(trainer.device))["all"].flops
        return {"by_category": None, "flops": flops}
    traces = {len(block.layers): _trace(trainer, block) for block in trainer.blocks}
    flops = sum(traces[len(block.layers)].flops for block in trainer.blocks)
    peak = traces[max(traces)].peak()
    # what is left was allocated within ops, where the tracker does not look
    inside = max(peak_bytes - peak.total_bytes, 0)
    parts = dict(zip(CATEGORIES, peak.by_category, strict=True))
    parts["workspaces"] += inside
    return {"by_category": parts, "flops": flops // len(trainer.blocks)}


def _trace(trainer: Trainer, block: Block) -> Trace:
    optimizers = [part.optimizer for part in trainer.parts.values()]
    return record(
        partial(trainer.step_block, block),
        model=trainer.models,
        optimizers=optimizers,
        inputs=(),
        device=trainer.device,
    )


def weigh_alone(
    case: TrainingCase, device: torch.device, free_bytes: int | None, way: Way
) -> Figures | None:
    """As `weigh`, of a process that does nothing else; None where it does not fit the GPU.

    Args:
        case, way:   as those of `weigh`
        device:      to train on
        free_bytes:  of the GPU before the process began; None where others run beside it
    Returns:
        Also device_bytes: what the driver has given the process, context and modules included.
    """
    try:
        trainer = make_trainer(case, way, device)
        gc.collect()
        torch.cuda.empty_cache()
        figures = weigh(case, way, trainer)
    except torch.OutOfMemoryError:
        return None
    taken = None if free_bytes is None else free_bytes - torch.cuda.mem_get_info(device)[0]
    return figures | {"device_bytes": taken}


# predicted


def predicted(
    case: TrainingCase, every: Sequence[Way], target: Target
) -> Iterator[tuple[Way, Figures]]:
    """Each way and its figures, in order, as they are found."""
    alike: dict[Way, list[Way]] = {}
    for way in every:
        alike.setdefault(_with_all(way), []).append(way)
    with _mapping(len(alike)) as mapped:
        found = mapped(partial(_figures_of, case, target), alike)
        for same, figures in zip(alike.values(), found, strict=True):
            for way in same:
                yield way, figures[way.resident]


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


def _with_all(way: Way) -> Way:
    """A rehearsal tells both what all blocks need on the device and what one needs."""
    return replace(way, resident="all", launch="ops")


def predict(case: TrainingCase, way: Way, target: Target) -> dict[str, Prediction]:
    """By what is on the device: all blocks, or one."""
    config = case.config(_with_all(way))
    budget = 1.0 if way.budget is None else way.budget
    return rehearse(config, baseline=way.baseline, budget=budget, target=target)


def _figures_of(case: TrainingCase, target: Target, way: Way) -> dict[str, Figures]:
    # a trace is large, and stays in the process that made it
    return {place: _figures(way, of) for place, of in predict(case, way, target).items()}


def _figures(way: Way, prediction: Prediction) -> Figures:
    # what a selective checkpoint keeps is in no hook's sight
    saved = None if way.method == "selective" else prediction.saved_bytes
    return {
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "saved_bytes": saved,
        "memory": "predicted",
        "by_category": prediction.by_category,
        "flops": prediction.flops,
    }
