"""What a trainer's steps really take: peak bytes by category, and seconds."""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from dbkernels.memory.measure import measure_peak
from dbkernels.training.trainer import Trainer

WARM_UP_STEPS = 2  # the first step makes the optimizer's state, the second is steady


def profile_trainer(trainer: Trainer, steps: int) -> dict[str, object]:
    """Peak bytes of the costliest block's step, and median seconds of a step and of a sweep.

    Where blocks visit the device, all of the room for one of them counts as parameters. The seconds
    are of steps without a swap.

    Args:
        trainer:  with steps left; it moves on by a few of each block
        steps:    that are timed, of every block
    """
    optimizers = [part.optimizer for part in trainer.parts.values()]
    peaks, seconds, allocated = [], [], []
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        for _ in range(WARM_UP_STEPS):
            step()
        seconds.append(statistics.median(_timed(step, trainer.device) for _ in range(steps)))
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        # apart from the tracker, under which autograd adds gradients up in new storages
        allocated.append(_allocated(step, trainer.device))
        peak = measure_peak(
            step, model=trainer.models, optimizers=optimizers, device=trainer.device
        )
        peaks.append(peak)
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    highest, reserved = max(allocated)
    return {
        "device": trainer.device.type,
        "peak_bytes": worst.total_bytes,
        "by_category": worst.by_category,
        "saved_bytes": max(peak.saved_bytes for peak in peaks),
        "allocated_bytes": highest or None,
        "reserved_bytes": reserved or None,
        "at": worst.at,
        "seconds_per_step": statistics.fmean(seconds),
        "seconds_per_sweep": sum(seconds),
    }


def _allocated(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The CUDA allocator's own peaks of a step, allocated and reserved; 0 off CUDA."""
    if device.type != "cuda":
        return 0, 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begin = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - begin
