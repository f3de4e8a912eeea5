"""From a loss to updated parameters: the optimizer runs after the backward, or in it.

After it, gradients may be added up over micro-batches, and their norm may be clipped before any
parameter moves. In it, each parameter is updated as soon as its gradient is whole, so a block's
gradients take the memory of one layer's; Lv et al. 2023 (arXiv:2306.09782) do so end to end.
Without clipping both give the same bits.

The host hears of a loss that is not finite when it has launched the next update already. Until it
says `go_on`, no update does anything, and the norm of each is NaN.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dbkernels.training.param_group import ParamGroup


class Updater(Protocol):
    """What makes of a loss the updates of some groups. Nothing is read back from the device."""

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss, or a micro-batch's share of one."""
        ...

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """End an update, whose losses sum to `loss`; no gradient is left.

        Returns:
            The gradient's norm before it was clipped, (); NaN after an update that was not finite.
        """
        ...

    def go_on(self) -> None:
        """Update again, after loss or gradients that were not finite."""
        ...


class OptimizerAfterBackward:
    """Updates when all gradients are there; not at all where the loss or one is not finite.

    Args:
        clip:    largest norm of an update's gradient; 0 for no limit
        device:  of the parameters that are updated
    """

    def __init__(self, clip: float, device: torch.device | str):
        self._clip = clip or torch.inf
        self._finite = _true(device)  # loss and gradient of every update so far

    def backward(self, loss: Tensor) -> None:
        """As `Updater.backward`; gradients add up."""
        loss.backward()

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """As `Updater.finish`."""
        parameters = [p for group in groups for p in group.parameters.values()]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip)
        norm = torch.where(self._finite, norm, torch.nan)
        # in place, where a graph finds it
        self._finite.copy_(torch.isfinite(loss + norm))
        for group in groups:
            group.update(where=self._finite)
            group.move_average(where=self._finite)
        return norm

    def go_on(self) -> None:
        """As `Updater.go_on`."""
        self._finite.fill_(True)


class OptimizerInBackward:
    """Updates in the backward, by hooks; nothing from the first gradient on that is not finite.

    Where the loss is not finite nothing is updated at all. Whoever else differentiates something
    that these parameters are in finds their gradients as ever.

    Args:
        groups:  all that it will ever update
        device:  of their updates
    """

    def __init__(self, groups: Sequence[ParamGroup], device: torch.device | str):
        self._finite = _true(device)  # loss and gradients of every update so far
        self._squares, self._updates = torch.zeros(()), False
        for group in groups:
            for parameter in group.parameters.values():
                parameter.register_post_accumulate_grad_hook(partial(self._update, group))

    def backward(self, loss: Tensor) -> None:
        """As `Updater.backward`, once in an update."""
        # of what is not finite this is NaN, and so is the sum
        self._squares = torch.where(self._finite, loss.detach() * 0, torch.nan)
        self._updates = True
        try:
            loss.backward()
        finally:
            self._updates = False

    def _update(self, group: ParamGroup, parameter: Tensor) -> None:
        if not self._updates:
            return
        self._squares += torch.linalg.vector_norm(parameter.grad).square()
        group.update(where=torch.isfinite(self._squares), only=parameter)

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """As `Updater.finish`."""
        # in place, where a graph finds it
        self._finite.copy_(torch.isfinite(self._squares))
        for group in groups:
            group.move_average(where=self._finite)
        return self._squares.sqrt()

    def go_on(self) -> None:
        """As `Updater.go_on`."""
        self._finite.fill_(True)


def _true(device: torch.device | str) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=device)


def updater(
    optimizer_in_backward: bool,
    clip: float,
    groups: Sequence[ParamGroup],
    device: torch.device | str,
) -> Updater:
    """The updater of a setting.

    Args:
        optimizer_in_backward:  whether a parameter is updated as soon as it has its gradient
        clip:    after the backward, as `OptimizerAfterBackward` has it
        groups:  all that it will ever update
        device:  of their updates
    """
    if optimizer_in_backward:
        return OptimizerInBackward(groups, device)
    return OptimizerAfterBackward(clip, device)
