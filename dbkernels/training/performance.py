"""What a trainer's steps really take: peak bytes by category, and seconds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from dbkernels.memory.device import DevicePeak, device_peak
from dbkernels.memory.measure import measure_peak
from dbkernels.training.trainer import Trainer

WARM_UP_STEPS = 2  # the first step makes the optimizer's state, the second is steady


def profile_trainer(trainer: Trainer, steps: int) -> dict[str, object]:
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
    optimizers = [group.optimizer for group in trainer.groups.values()]
    peaks, seconds, first, steady = [], [], [], []
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        first += _on_gpu(step, trainer.device)
        for _ in range(WARM_UP_STEPS - len(first[-1:])):
            step()
        seconds.append(statistics.median(_timed(step, trainer.device) for _ in range(steps)))
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        # apart from the tracker, under which autograd adds gradients up in new storages
        steady += _on_gpu(step, trainer.device)
        peak = measure_peak(
            step, model=trainer.blocks, optimizers=optimizers, device=trainer.device
        )
        peaks.append(peak)
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    return {
        "device": trainer.device.type,
        "peak_bytes": worst.total_bytes,
        "by_category": worst.by_category,
        "saved_bytes": max(peak.saved_bytes for peak in peaks),
        "first_step": _highest(first),
        "steady_step": _highest(steady),
        "at": worst.at,
        "seconds_per_step": statistics.fmean(seconds),
        "seconds_per_sweep": sum(seconds),
    }


def _on_gpu(step: Callable[[], object], device: torch.device) -> list[DevicePeak]:
    """The peak of a step that is run on a GPU; nothing, and no step, off it."""
    return [device_peak(step, device)] if device.type == "cuda" else []


def _highest(peaks: list[DevicePeak]) -> dict[str, int | None] | None:
    return asdict(max(peaks, key=lambda peak: peak.allocated_bytes)) if peaks else None


def _timed(step: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begin = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - begin
