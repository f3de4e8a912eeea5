"""What a GPU's allocator and its driver say of a step."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DevicePeak:
    """The highest of one step on a GPU."""

    allocated_bytes: int
    """Of tensors."""
    active_bytes: int
    """Of tensors, and of what other streams have yet to let go of."""
    reserved_bytes: int
    """That the allocator took from the driver."""
    retries: int
    """Allocations that succeeded only after the allocator had given its cache back."""
    process_bytes: int | None
    """That the driver counts to this process, its context too; None where it does not tell."""


def device_peak(step: Callable[[], object], device: torch.device) -> DevicePeak:
    """Run a step once on a GPU; the allocator's statistics are reset.

    Args:
        step:    what to measure
        device:  an NVIDIA GPU
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    step()
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    return DevicePeak(
        allocated_bytes=stats["allocated_bytes.all.peak"],
        active_bytes=stats["active_bytes.all.peak"],
        reserved_bytes=stats["reserved_bytes.all.peak"],
        retries=stats.get("num_alloc_retries", 0) - retries,
        process_bytes=process_bytes(device),
    )


def process_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that the driver counts to this process, context and kernels included.

    None without nvidia-ml-py (the extra `gpu`), or where the driver hides the process, as in some
    containers.
    """
    try:
        import pynvml
    except ImportError:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
