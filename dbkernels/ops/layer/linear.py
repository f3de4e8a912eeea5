"""One linear map of tokens, as a layer's passes see it: y = x W^T + b, and dx = dy W."""

from typing import NamedTuple

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (tokens, D)."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


class Linear(NamedTuple):
    """Weight and bias of one projection, in the dtype of the branches."""

    weight: Tensor
    """(D_out, D_in)"""
    bias: Tensor | None = None
    """(D_out,)"""

    @property
    def width(self) -> int:
        """D_out."""
        return len(self.weight)

    def of(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(..., D_in) -> (..., D_out), into out (tokens, D_out) where it is given."""
        rows = as_rows(x)
        if self.bias is None:
            y = torch.mm(rows, self.weight.T, out=out)
        else:
            y = torch.addmm(self.bias, rows, self.weight.T, out=out)
        return y.view(*x.shape[:-1], self.width)

    def back(self, dy: Tensor, *, out: Tensor | None = None) -> Tensor:
        """dx (..., D_in) from dy (..., D_out), into out (tokens, D_in) where it is given."""
        dx = torch.mm(as_rows(dy), self.weight, out=out)
        return dx.view(*dy.shape[:-1], self.weight.shape[1])

    def add_of(self, x: Tensor, total: Tensor) -> None:
        """total (..., D_out) += `of` x."""
        total = as_rows(total).addmm_(as_rows(x), self.weight.T)
        if self.bias is not None:
            total += self.bias

    def add_back(self, dy: Tensor, total: Tensor) -> None:
        """total (..., D_in) += `back` of dy."""
        as_rows(total).addmm_(as_rows(dy), self.weight)

    def rows(self, start: int, stop: int | None) -> "Linear":
        """Of some of its outputs."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight[start:stop], bias)
