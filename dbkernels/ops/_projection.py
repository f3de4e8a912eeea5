"""Linear projections of tokens, and sums of their weights' gradients over chunks of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x W^T + b, from (..., D_in) to (..., D_out), into out (tokens, D_out) where it is given."""
    rows = as_rows(x)
    if bias is None:
        y = torch.mm(rows, weight.T, out=out)
    else:
        y = torch.addmm(bias, rows, weight.T, out=out)
    return y.view(*x.shape[:-1], len(weight))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (tokens, D)."""
    return x.view(-1, x.shape[-1])


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; an empty one where there are none, so that sums are zeros."""
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


class Gradients:
    """Gradients of the weights that are wanted, by name, each a sum over all tokens."""

    def __init__(self, wanted: frozenset[str]):
        self.wanted = wanted
        self.sums: dict[str, Tensor] = {}

    def add_projection(self, name: str, dy: Tensor, x: Tensor) -> None:
        """The weight's and the bias's gradient of y = x W^T + b."""
        self.add_weight(name, dy, x)
        self.add_bias(name, dy)

    def add_weight(self, name: str, dy: Tensor, x: Tensor) -> None:
        if f"{name}_weight" in self.wanted:
            self.add(f"{name}_weight", as_rows(dy).T @ as_rows(x))

    def add_bias(self, name: str, dy: Tensor) -> None:
        if f"{name}_bias" in self.wanted:
            self.add(f"{name}_bias", as_rows(dy).sum(0))

    def add(self, name: str, value: Tensor) -> None:
        """Add a chunk's part; from the second on in float32, as bfloat16 would lose small ones."""
        total = self.sums.get(name)
        if total is not None:
            value = total.to(torch.promote_types(total.dtype, torch.float32)).add_(value)
        self.sums[name] = value
