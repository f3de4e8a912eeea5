"""What a recipe's steps really take: peak bytes by category, and seconds.

Each recipe has a process of its own. There, what the allocator has reserved and the driver has
given is the recipe's alone, and one that ends its process leaves the others theirs.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch

from dbkernels.memory.measure import allocator_peak, measure_peak, out_of_memory
from dbkernels.planning.recipe import Recipe
from dbkernels.pool import processes
from dbkernels.training.trainer import Trainer

Figures = dict[str, Any]  # a JSON object

KILLED = "its process was killed, as where the host has no memory left"


def measured(recipe: Recipe, device: torch.device, steps: int) -> Figures:
    """Run a recipe's steps in a process of its own.

    Args:
        recipe:  to train by
        device:  of this machine
        steps:   that are timed, of every block
    Returns:
        Peaks, their parts and seconds, under the names that a row has for them; or not_measured,
        a sentence that says why there are none.
    """
    with processes(1) as pool:
        try:
            return pool.submit(figures_of, recipe, device, steps).result()
        except BrokenProcessPool:
            return {"not_measured": KILLED}


def figures_of(recipe: Recipe, device: torch.device, steps: int) -> Figures:
    """As `measured`, in this process."""
    try:
        trainer = recipe.trainer(device)
        found = profile_trainer(trainer, steps)
    except (MemoryError, RuntimeError) as error:
        if reason := out_of_memory(error):
            return {"not_measured": reason}
        raise
    fits = trainer.micro_batch.size
    if fits < recipe.micro_batch:
        reason = f"of a batch of {recipe.batch_size} the device holds {fits} samples at once"
        return {"not_measured": reason}
    return found


def profile_trainer(trainer: Trainer, steps: int) -> Figures:
    """Peak bytes of the costliest block's step, and median seconds of a step and of a sweep.

    Where blocks are offloaded, all of the room for one of them counts as parameters. The seconds
    are of steps without a swap.

    Args:
        trainer:  with steps left; it moves on by a few of each block
        steps:    that are timed, of every block
    Returns:
        By name; what only a GPU tells, of the first step and of the steady one that peaks highest,
        is None off a GPU.
    """
    device = trainer.device
    blocks = [partial(trainer.step_block, block) for block in trainer.blocks]
    optimizers = [each for group in trainer.groups.values() for each in group.optimizers]
    peaks, seconds, first, steady = [], [], [], []
    for step in blocks:
        # the first step makes the optimizer's state, the second is steady
        first.append(_allocated(step, device))
        step()
        seconds.append(statistics.median(_timed(step, device) for _ in range(steps)))
    for step in blocks:
        # apart from the tracker, under which autograd adds gradients up in new storages
        steady.append(_allocated(step, device))
        peaks.append(measure_peak(step, model=trainer.blocks, optimizers=optimizers, device=device))
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    on_gpu = _highest(steady) or {}
    return {
        "device": device.type,
        "first_step": _highest(first),
        "steady_step": _highest(steady),
        "seconds_per_step": statistics.fmean(seconds),
        "seconds_per_sweep": sum(seconds),
        "measured_allocated_bytes": on_gpu.get("allocated_bytes", worst.total_bytes),
        "measured_reserved_bytes": on_gpu.get("reserved_bytes", worst.total_bytes),
        "measured_by_category": worst.by_category,
        "measured_saved_bytes": max(peak.saved_bytes for peak in peaks),
    }


def _allocated(step: Callable[[], object], device: torch.device) -> Figures:
    """Run a step; what a GPU's allocator says of it, and nothing off a GPU."""
    with allocator_peak(device) as found:
        step()
    return found


def _highest(peaks: list[Figures]) -> Figures | None:
    return max(filter(None, peaks), key=lambda peak: peak["allocated_bytes"], default=None)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.get_device_module(device).synchronize
    synchronise()
    begin = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - begin
