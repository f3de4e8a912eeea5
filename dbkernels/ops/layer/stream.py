"""The residual stream of a run of layers: kept once, and rebuilt from the branches.

    x[l + 1] = x[l] + gate1[l] * a[l] + gate2[l] * m[l]

A layer keeps its branches' outputs a and m for the gradients of its gates, so in a run of layers
only the first need keep x. The others compute it again, by the same sums in the same order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.gated_residual import gated_residual_forward

LENGTH = 4  # layers of a run: the last of n rebuilds x by 2 (n - 1) gated sums


class Run(NamedTuple):
    """How a layer's input came about: x of the run's first layer, and gated sums since."""

    start: Tensor
    """(B, T, D)"""
    gates: tuple[Tensor, ...] = ()
    """(samples, D) each."""
    branches: tuple[Tensor, ...] = ()
    """(B, T, D) each, one for a gate."""

    def x(self) -> Tensor:
        """The stream at the end of the run, by the sums of the forward in their order."""
        x = self.start
        for gate, h in zip(self.gates, self.branches, strict=True):
            y = torch.empty_like(x) if x is self.start else x
            gated_residual_forward(
                *(by_sample(t, len(gate)) for t in (x, h)), gate, y=by_sample(y, len(gate))
            )
            x = y
        return x


class ResidualStream:
    """Follows x through a stack of layers, so that not each of them keeps it.

    Give the same one to each layer in order. Where x is not the output of the layer before, a new
    run starts, so other operations may stand between layers. It must not be given to a layer inside
    `torch.utils.checkpoint`, which would run the layer again after the stream has gone on.
    """

    def __init__(self) -> None:
        self._run: Run | None = None
        self._out: Tensor | None = None

    def run_to(self, x: Tensor) -> Run:
        """The run that leads to x; an empty one where the layer has to keep x."""
        if self._run is None or self._out is not x or len(self._run.gates) > 2 * (LENGTH - 1):
            return Run(x.detach())
        return self._run

    def extend(self, run: Run, out: Tensor, gates: list[Tensor], branches: list[Tensor]) -> None:
        """Add a layer, whose input the run leads to and whose output is out."""
        gates = [gate.detach() for gate in gates]
        self._run = Run(run.start, (*run.gates, *gates), (*run.branches, *branches))
        self._out = out


def by_sample(t: Tensor, samples: int) -> Tensor:
    """(B, T, D) as (samples, tokens of one, D)."""
    if t.dim() == 3 and len(t) == samples:
        return t
    return t.view(samples, t.numel() // (max(samples, 1) * t.shape[-1]), t.shape[-1])
