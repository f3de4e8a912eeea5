"""The weights of an adapter, which stand inside the projection that it is added to."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from dbkernels.ops.layer.linear import Adapter, Linear
from dbkernels.ops.layer.shapes import PROJECTIONS

CHILD = "adapters"  # of a projection: its adapters by target


class LowRank(nn.Module):
    """A and B of one adapter: s B A x is added to some of a projection's outputs.

    Args:
        reads:    the projection's D_in
        outputs:  to which it is added
        rank:     r
        alpha:    s = alpha / r
        start:    the first of the outputs
        dtype:    of both
        device:   of both
    """

    def __init__(
        self,
        reads: int,
        outputs: int,
        rank: int,
        *,
        alpha: float,
        start: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, reads, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))
        # as nn.Linear does, which makes A of the libraries; with B of zeros nothing changes yet
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.alpha, self.start = alpha, start

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def of(self, projection: str) -> Adapter:
        """For the op, which knows the projection by this name."""
        return Adapter(projection, self.down, self.up, self.alpha / self.rank, self.start)

    def product(self) -> Tensor:
        """s B A (outputs, D_in), in the adapter's dtype."""
        return self.alpha / self.rank * (self.up @ self.down)


def adapters_of(projection: nn.Linear, name: str) -> tuple[Adapter, ...]:
    """Those that stand in a projection, for an op that knows it by this name."""
    inside = projection._modules.get(CHILD)
    return () if inside is None else tuple(each.of(name) for each in inside.values())


def adapters_of_all(projections: Sequence[nn.Linear | None]) -> tuple[Adapter, ...]:
    """Those of a layer's qkv, out, fc1 and fc2, of which some may not be there."""
    each = zip(projections, PROJECTIONS, strict=True)
    found = (adapters_of(module, name) for module, name in each if module is not None)
    return tuple(chain.from_iterable(found))


def as_linear(projection: nn.Linear, name: str = "linear") -> Linear:
    """A projection and its adapters, for plain torch."""
    own = adapters_of(projection, name)
    # none but a layer's own projections know of ranks
    ranks = getattr(projection, "ranks", None)
    return Linear(projection.weight, projection.bias, own, adds_back=ranks)
