"""Steps that the device can leave out, for optimizers that have no such thing of their own."""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from dbkernels.memory.plain import plain_tensors


def skipping(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """A kind whose step does nothing where `found_inf` is not 0, as that of torch's fused ones.

    What a step writes is kept beside it and put back, for one tensor at a time. So its step on a
    tensor must need no other tensor, and its state must be there before.
    """
    # without the hooks, which run once for all tensors
    step_of_one = inspect.unwrap(kind.step)

    @torch.no_grad()
    def step(self: Optimizer, closure: None = None) -> None:
        skip = vars(self)["found_inf"] > 0
        for tensor in _one_by_one(self):
            state = self.state[tensor].values()
            written = [plain for each in (tensor, *state) for _, plain in plain_tensors("", each)]
            before = [each.clone() for each in written]
            step_of_one(self)
            for each, old in zip(written, before, strict=True):
                each.copy_(torch.where(skip, old, each))

    return type(kind.__name__, (kind,), {"step": step, "_step_supports_amp_scaling": True})


def _one_by_one(optimizer: Optimizer) -> Iterator[Tensor]:
    """Each tensor with a gradient, while the optimizer has no other."""
    groups = optimizer.param_groups
    every = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = []
        for group, tensors in zip(groups, every, strict=True):
            for tensor in tensors:
                if tensor.grad is not None:
                    group["params"] = [tensor]
                    yield tensor
            group["params"] = []
    finally:
        for group, tensors in zip(groups, every, strict=True):
            group["params"] = tensors
