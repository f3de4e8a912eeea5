"""The peak of a step by category: measured on a CPU or a GPU, or predicted from fake tensors.

Lifetimes come from the tracker; this file tells it what the tensors are for. A gradient may be
freed before the step returns, so each is named in the moment it is accumulated, and again when an
optimizer is about to use it.

A prediction takes no GPU, and no memory of the step's size. What the dispatcher does not see is
added: workspaces by a table, and the rules of the caching allocator.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from dbkernels.memory.allocator import Target, place
from dbkernels.memory.tracker import CATEGORIES, Trace, Tracker, Workspace

MEASURED = CATEGORIES[:-1]  # what an op allocates inside itself is not seen
CPU = torch.device("cpu")
HOST = "DefaultCPUAllocator: "  # torch has no class for a host that is out of memory


@dataclass(frozen=True)
class Peak:
    """What was alive on one device at the highest moment of a callable."""

    total_bytes: int
    by_category: dict[str, int]  # bytes of each of MEASURED at that moment; sums to total_bytes
    saved_bytes: int  # held for the backward, at their own highest; no parameters, no inputs
    at: str  # phase and op, such as "backward: aten::mm"; "start" before the first op
    allocated_bytes: int | None = None  # the CUDA allocator's own peak; None off CUDA
    reserved_bytes: int | None = None  # what that allocator took from the driver; None off CUDA

    def __post_init__(self) -> None:
        assert sum(self.by_category.values()) == self.total_bytes


def measure_peak(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    inputs: Sequence[Tensor] = (),
    device: torch.device | None = None,
) -> Peak:
    """Run `step` once and tell what was alive at its peak.

    Parameters, buffers, gradients, optimizer state and inputs that exist already count from the
    start, and so does every other tensor from before that the step reads. Buffers that an op
    allocates inside itself are seen only by the CUDA allocator.

    Args:
        step:        what to measure; its numbers are those of an unmeasured run
        model:       its parameters, buffers and gradients are told from the rest
        optimizers:  their state is told from the rest, also state that the step creates
        inputs:      tensors of the caller that stay alive, read or not
        device:      where to count; None is the one device of the model, or else of the inputs
    Returns:
        Peak, in bytes of storages on that device. On CUDA also the allocator's peaks, whose
        statistics are reset.
    Raises:
        ValueError: optimizers or inputs is no sequence, or the device is not told.
    """
    # tensors on "cuda" say "cuda:0", and on "cpu" say "cpu"
    there = torch.empty(0, dtype=torch.uint8, device=device).device if device else None
    device = there or _only_device(model, inputs)
    with allocator_peak(device) as own:
        trace = record(step, model=model, optimizers=optimizers, inputs=inputs, device=device)
    peak = trace.peak()
    parts = {name: peak.by_category[name] for name in MEASURED}
    gpu = (own.get(name) for name in ("allocated_bytes", "reserved_bytes"))
    return Peak(peak.total_bytes, parts, trace.saved, trace.name(peak.op), *gpu)


def record(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    inputs: Sequence[Tensor] = (),
    device: torch.device = CPU,
    workspace: Workspace | None = None,
) -> Trace:
    """Run `step` once and log every storage of a device, each under what it is for.

    Args as those of `measure_peak`; the device as its tensors name it, and the workspace as that of
    `Tracker`.

    Raises:
        ValueError: optimizers or inputs is no sequence.
    """
    for name, values, kind in (("optimizers", optimizers, Optimizer), ("inputs", inputs, Tensor)):
        none: list[str] = []
        wrong = none if isinstance(values, Sequence) else [type(values).__name__]
        wrong = wrong or [f"a {type(v).__name__} in it" for v in values if not isinstance(v, kind)]
        if wrong:
            raise ValueError(f"{name} must be a sequence of {kind.__name__}, got {wrong[0]}")
    tracker = Tracker(device, workspace)
    tracker.tag(inputs, "inputs")
    _tag_state(tracker, model, optimizers)
    with _naming_gradients(tracker, model, optimizers), tracker:
        step()
        _tag_state(tracker, model, optimizers)
    return tracker.trace()


def _only_device(model: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()] or inputs
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(
            "device must be given unless the model is on exactly one, "
            f"got a model on {sorted(map(str, devices))}"
        )
    return devices.pop()


def _tag_state(tracker: Tracker, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    tracker.tag([*model.parameters(), *model.buffers()], "parameters")
    tracker.tag((p.grad for p in model.parameters()), "gradients")
    for optimizer in optimizers:
        tracker.tag(tree_iter(list(optimizer.state.values())), "optimizer")


@contextmanager
def _naming_gradients(
    tracker: Tracker, model: nn.Module, optimizers: Sequence[Optimizer]
) -> Iterator[None]:
    """Tag every gradient while it is there, and leave no hook behind."""

    def accumulated(*parameters: Tensor) -> None:
        tracker.tag((parameter.grad for parameter in parameters), "gradients")

    # also finds the gradients of parameters that the step itself unfreezes
    def before_step(optimizer: Optimizer, *_: object) -> None:
        tracker.optimizing = True
        for group in optimizer.param_groups:
            accumulated(*group["params"])

    def after_step(*_: object) -> None:
        tracker.optimizing = False

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(accumulated)
                stack.callback(hook.remove)
        for optimizer in optimizers:
            stack.callback(optimizer.register_step_pre_hook(before_step).remove)
            stack.callback(optimizer.register_step_post_hook(after_step).remove)
        yield


@dataclass(frozen=True)
class Prediction:
    """One step on one device, as it will be."""

    peak_allocated_bytes: int  # of blocks of the caching allocator; on a CPU, of storages
    peak_reserved_bytes: int  # what that allocator takes from the driver; on a CPU, the same again
    by_category: dict[str, int]  # bytes of each of CATEGORIES at the peak; sums to allocated
    saved_bytes: int  # of storages held for the backward, at their own highest
    at: str  # phase and op of the peak; "start" before the first op
    flops: int  # of matmuls and attention
    trace: Trace | None = field(repr=False, compare=False)  # with the workspaces that stay
    # the trace with the bytes that the allocator gave, in place of those asked for
    blocks: Trace | None = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        assert sum(self.by_category.values()) == self.peak_allocated_bytes


def predict(trace: Trace, target: Target) -> Prediction:
    """What a run needs on a target.

    Args:
        trace:   recorded with the target's workspaces
        target:  the device that is predicted
    """
    trace = blocks = trace.beside(target.resident)
    if target.is_gpu:
        events, allocator = place(trace.events)
        blocks = replace(trace, events=events)
    peak = blocks.peak()
    return Prediction(
        peak_allocated_bytes=peak.total_bytes,
        peak_reserved_bytes=allocator.reserved_bytes if target.is_gpu else peak.total_bytes,
        by_category=peak.by_category,
        saved_bytes=trace.saved,
        # on a CPU's fake tensors its own attention stands for a GPU's, of the same shapes
        at=trace.name(peak.op).replace("_for_cpu", "" if target.is_gpu else "_for_cpu"),
        flops=trace.flops,
        trace=trace,
        blocks=blocks,
    )


@contextmanager
def allocator_peak(device: torch.device) -> Iterator[dict[str, int | None]]:
    """What a GPU's allocator and its driver say of the work within; its statistics are reset.

    Args:
        device:  an NVIDIA GPU, or a CPU, of which nothing is said
    Returns:
        A dictionary that is filled when the work on a GPU is done, with the highest of

            allocated_bytes  of tensors
            active_bytes     of tensors, and of what other streams have yet to let go of
            reserved_bytes   that the allocator took from the driver
            retries          allocations that succeeded only after it had given its cache back
            process_bytes    that the driver counts to this process, its context too; None where it
                             does not tell
    """
    found: dict[str, int | None] = {}
    if device.type != "cuda":
        yield found
        return
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    yield found
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    for name in ("allocated_bytes", "active_bytes", "reserved_bytes"):
        found[name] = stats[f"{name}.all.peak"]
    found["retries"] = stats.get("num_alloc_retries", 0) - retries
    found["process_bytes"] = process_bytes(device)


def process_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that the driver counts to this process, context and kernels included.

    None without nvidia-ml-py (the extra `gpu`), or where the driver hides the process, as in some
    containers.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)


def out_of_memory(error: BaseException) -> str | None:
    """What an error says, if it says that a device or the host has no memory left; else None."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return text or "out of memory"
    if isinstance(error, RuntimeError) and HOST in text:
        return text.partition(HOST)[2]
    return None
