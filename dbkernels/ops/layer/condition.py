"""What comes of a layer's condition: its modulation, kept for the backward or computed again.

A condition of each token would have six widths of it kept for each token. Policies that keep little
keep the condition instead, which all layers of a stack share, and the backward computes the
modulation again for the samples that it works on.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.layer.part import Part


class Condition(NamedTuple):
    """A condition of each token, and the function that makes its modulation."""

    c: Tensor
    """(B, T, C)"""
    modulate: Callable[..., Tensor]
    """(c, *parameters) -> (B, T, 6 D), each token for itself and nothing random."""
    parameters: tuple[Tensor, ...] = ()
    """That have a gradient by it."""

    def modulation(self) -> Tensor:
        """(B, T, 6 D); autograd sees how it is made."""
        return self.modulate(self.c, *self.parameters)


def rows_of_modulation(modulation: Tensor) -> Tensor:
    """(B, 6 D) or (B, T, 6 D) as (samples, 6 D) whose columns follow each other, for kernels."""
    rows = checks.as_rows(modulation)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def autocast_again(device: torch.device) -> Callable[[], AbstractContextManager]:
    """What opens the autocast that there is now, or closes all, once more."""
    kind = device.type
    if kind == "meta":  # which has none
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


class ModulationGradient:
    """That of a modulation (samples, 6 D), whose rows come in parts."""

    def __init__(self, modulation: Tensor):
        self._modulation = modulation
        self._total: Tensor | None = None

    def part(self, part: Part) -> Tensor:
        """Rows of the modulation of some samples, (rows, 6 D)."""
        return part.of(self._modulation)

    def add(self, part: Part, dmodulation: Tensor) -> None:
        """The gradient of those rows, which were the last that were asked for."""
        if part.is_all:
            self._total = dmodulation
            return
        if self._total is None:
            self._total = torch.empty_like(self._modulation)
        part.put(self._total, dmodulation)

    def results(self) -> list[Tensor]:
        """One: the whole."""
        return [self._total]


class ConditionGradient:
    """Those of a condition and its parameters, from the modulation's, a few samples at a time."""

    def __init__(self, condition: Condition, wanted: Sequence[bool], autocast: Callable):
        self._condition, self._autocast = condition, autocast
        self._wanted = list(wanted)  # of c and of each parameter
        c = condition.c
        self._dc = torch.empty(c.shape, dtype=c.dtype, device=c.device) if wanted[0] else None
        self._sums: list[Tensor | None] = [None] * len(condition.parameters)
        self._graph: tuple[Tensor, list[Tensor]] | None = None

    def part(self, part: Part) -> Tensor:
        """Rows of the modulation of some samples, (rows, 6 D), computed again."""
        c, modulate, parameters = self._condition
        leaves = [
            t.detach().requires_grad_(want)
            for t, want in zip((part.of(c), *parameters), self._wanted, strict=True)
        ]
        with torch.enable_grad(), self._autocast():
            modulation = modulate(*leaves)
        self._graph = modulation, leaves
        return rows_of_modulation(modulation.detach())

    def add(self, part: Part, dmodulation: Tensor) -> None:
        """The gradient of those rows, which were the last that were asked for."""
        modulation, leaves = self._graph
        self._graph = None
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not wanted:
            return
        found = iter(torch.autograd.grad(modulation, wanted, dmodulation.view(modulation.shape)))
        grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        if self._dc is not None:
            part.put(self._dc, grads[0])
        for place, grad in enumerate(grads[1:]):
            total = self._sums[place]
            if grad is not None and total is not None:
                # parts are added in float32 however narrow the parameter is
                grad = total.to(checks.statistics_dtype(total)).add_(grad)
            self._sums[place] = grad

    def results(self) -> list[Tensor | None]:
        """Of c, and of each parameter."""
        pairs = zip(self._sums, self._condition.parameters, strict=True)
        return [self._dc, *(total if total is None else total.to(p.dtype) for total, p in pairs)]
