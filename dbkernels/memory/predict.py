"""The peak of a step that is run on fake tensors: no GPU, and no memory of its size, is needed.

Lifetimes come from the tracker, as in a measurement; what the dispatcher does not see is added:
workspaces by a table, and the rules of the caching allocator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dbkernels.memory.allocator import Placement, place
from dbkernels.memory.measure import check_owners, record
from dbkernels.memory.trace import CATEGORIES, Trace
from dbkernels.memory.workspace import Target


@dataclass(frozen=True)
class Prediction:
    """One step on one device, as it will be."""

    peak_allocated_bytes: int  # of blocks of the caching allocator; on a CPU, of storages
    peak_reserved_bytes: int  # what that allocator takes from the driver; on a CPU, the same again
    by_category: dict[str, int]  # bytes of each of CATEGORIES at the peak; sums to allocated
    saved_bytes: int  # of storages held for the backward, at their own highest
    at: str  # phase and op of the peak; "start" before the first op
    flops: int  # of matmuls and attention
    trace: Trace = field(repr=False, compare=False)  # with the workspaces that stay
    placement: Placement | None = field(repr=False, compare=False)  # None on a CPU

    @property
    def blocks(self) -> Trace:
        """The trace with the bytes that the allocator gave, in place of those asked for."""
        return self.trace if self.placement is None else self.trace.of(self.placement.events)


def predict_peak(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    inputs: Sequence[Tensor] = (),
    target: Target,
) -> Prediction:
    """Run `step` once, on fake tensors of the CPU, and tell what it will need on a target.

    Args:
        step:        of a model that was made under the same `FakeTensorMode`, which is on
        model:       what is on the device: its parameters, buffers and gradients
        optimizers:  likewise; their state should be there, or its creation counts as the step's
        inputs:      tensors of the caller that stay alive, read or not
        target:      the device that is predicted
    Returns:
        Prediction. The device's context and other processes are not in it.
    Raises:
        ValueError: optimizers or inputs is no sequence.
    """
    check_owners(optimizers, inputs)
    trace = record(
        step,
        model=model,
        optimizers=optimizers,
        inputs=inputs,
        device=torch.device("cpu"),
        workspace=target.workspace,
    )
    return predict(trace, target)


def predict(trace: Trace, target: Target) -> Prediction:
    """What a run needs on a target.

    Args:
        trace:   recorded with the target's workspaces
        target:  the device that is predicted
    """
    trace = trace.beside(target.resident)
    placement = place(trace.events) if target.is_gpu else None
    peak = (trace.of(placement.events) if placement else trace).peak()
    return Prediction(
        peak_allocated_bytes=peak.total_bytes,
        peak_reserved_bytes=peak.total_bytes if placement is None else placement.reserved_bytes,
        by_category=dict(zip(CATEGORIES, peak.by_category, strict=True)),
        saved_bytes=trace.saved,
        # on a CPU's fake tensors its own attention stands for a GPU's, of the same shapes
        at=trace.name(peak.op).replace("_for_cpu", "" if target.is_gpu else "_for_cpu"),
        flops=trace.flops,
        trace=trace,
        placement=placement,
    )
