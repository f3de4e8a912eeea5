"""The peak of any callable, by category, on a CPU or a GPU.

Lifetimes come from the tracker; this file tells it what the tensors are for. A gradient may be
freed before the callable returns, so each is named in the moment it is accumulated, and again
when an optimizer is about to use it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from dbkernels.memory.trace import CATEGORIES, WORKSPACES, Trace
from dbkernels.memory.tracker import Tracker, Workspace

MEASURED = CATEGORIES[:WORKSPACES]  # what an op allocates inside itself is not seen


@dataclass(frozen=True)
class Peak:
    """What was alive on one device at the highest moment of a callable."""

    total_bytes: int
    by_category: dict[str, int]  # bytes of each of MEASURED at that moment; sums to total_bytes
    saved_bytes: int  # held for the backward, at their own highest; no parameters, no inputs
    at: str  # phase and op, such as "backward: aten::mm"; "start" before the first op
    allocated_bytes: int | None = None  # the CUDA allocator's own peak; None off CUDA
    reserved_bytes: int | None = None  # what that allocator took from the driver; None off CUDA


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
        device:      where to count; None is the one device of the model and the inputs
    Returns:
        Peak, in bytes of storages on that device. On CUDA also the allocator's peaks, whose
        statistics are reset.
    Raises:
        ValueError: optimizers or inputs is no sequence, or the device is not told.
    """
    check_owners(optimizers, inputs)
    device = _only_device(model, inputs) if device is None else _indexed(device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    trace = record(step, model=model, optimizers=optimizers, inputs=inputs, device=device)
    allocated = reserved = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
    peak = trace.peak()
    return Peak(
        total_bytes=peak.total_bytes,
        by_category=dict(zip(MEASURED, peak.by_category, strict=False)),
        saved_bytes=trace.saved,
        at=trace.name(peak.op),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
    )


def record(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    inputs: Sequence[Tensor],
    device: torch.device,
    workspace: Workspace | None = None,
) -> Trace:
    """Run `step` once and log every storage of a device, each under what it is for.

    Args as those of `measure_peak`; the device as its tensors name it, and the workspace as that of
    `Tracker`.
    """
    tracker = Tracker(device, workspace)
    tracker.tag(inputs, "inputs")
    _tag_state(tracker, model, optimizers)
    with _naming_gradients(tracker, model, optimizers), tracker:
        step()
        _tag_state(tracker, model, optimizers)
    return tracker.trace()


def check_owners(optimizers: Sequence[Optimizer], inputs: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are sequences of what they are named for."""
    _check_sequence("optimizers", optimizers, Optimizer)
    _check_sequence("inputs", inputs, Tensor)


def _check_sequence(name: str, values: Sequence, kind: type) -> None:
    got = None if isinstance(values, Sequence) else type(values).__name__
    if got is None:
        got = next((f"a {type(v).__name__} in it" for v in values if not isinstance(v, kind)), None)
    if got is not None:
        raise ValueError(f"{name} must be a sequence of {kind.__name__}, got {got}")


def _only_device(model: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    devices = devices or {tensor.device for tensor in inputs}
    if len(devices) != 1:
        raise ValueError(
            "device must be given unless the model is on exactly one, "
            f"got a model on {sorted(map(str, devices))}"
        )
    return devices.pop()


def _indexed(device: torch.device) -> torch.device:
    # tensors on "cuda" say "cuda:0", and on "cpu" say "cpu"
    return torch.empty(0, device=device).device


def _tag_state(tracker: Tracker, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    tracker.tag(model.parameters(), "parameters")
    tracker.tag(model.buffers(), "parameters")
    tracker.tag((p.grad for p in model.parameters() if p.grad is not None), "gradients")
    for optimizer in optimizers:
        state = tree_iter(list(optimizer.state.values()))
        tracker.tag((leaf for leaf in state if isinstance(leaf, Tensor)), "optimizer")


@contextmanager
def _naming_gradients(
    tracker: Tracker, model: nn.Module, optimizers: Sequence[Optimizer]
) -> Iterator[None]:
    """Tag every gradient while it is there, and leave no hook behind."""

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag([parameter.grad], "gradients")

    # also finds the gradients of parameters that the step itself unfreezes
    def before_step(optimizer: Optimizer, *_: object) -> None:
        tracker.optimizing = True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                accumulated(parameter)

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
