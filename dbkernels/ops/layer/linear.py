"""One linear map of tokens, as a layer's passes see it, with the adapters that stand beside it.

    y  = x W^T + b + s (x A^T) B^T
    dx = dy W      + s (dy B) A

Hu et al. 2021 (arXiv:2106.09685), LoRA. W + s B A is never formed. What an adapter needs beside
these is x A^T or dy B, r numbers for each token, which are made where they are used and not kept:
the backward reads x again for the gradient of A in any case, and x A^T costs it 2 r flops for each
number of x.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.layer.ranks import Ranks, sum_or_not


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (tokens, D)."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


class Adapter(NamedTuple):
    """A map of low rank that is added to a projection, or to some of its outputs.

    Its tensors may have another dtype than the projection's; it runs in that of the branches.
    """

    projection: str
    """Its name, such as qkv."""
    down: Tensor
    """A, (r, D_in)"""
    up: Tensor
    """B, (outputs, r)"""
    scale: float = 1.0
    """s, alpha / r."""
    start: int = 0
    """The first output of the projection that it is added to."""

    @property
    def stop(self) -> int:
        """One after the last."""
        return self.start + len(self.up)

    def narrow(self, x: Tensor) -> Tensor:
        """s x A^T (tokens, r) of x (tokens, D_in)."""
        return _scaled_product(x, self.down.T, self.scale)

    def narrow_back(self, dy: Tensor) -> Tensor:
        """s dy B (tokens, r), from dy (tokens, D_out) of all of the projection's outputs."""
        return _scaled_product(self.seen(dy), self.up, self.scale)

    def seen(self, y: Tensor) -> Tensor:
        """Of (tokens, D_out), the outputs that it is added to: a view."""
        return y[:, self.start : self.stop]

    def rows(self, start: int, stop: int) -> "Adapter | None":
        """Of some of the projection's outputs; None where it is added to none of them."""
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        up = self.up[first - self.start : last - self.start]
        return self._replace(up=up, start=first - start)


def flat_adapters(adapters: Sequence[Adapter]) -> tuple[Tensor, ...]:
    """Their tensors in one row, two of each."""
    return tuple(t for adapter in adapters for t in (adapter.down, adapter.up))


def with_adapters(
    adapters: Sequence[Adapter], tensors: Sequence[Tensor | None]
) -> tuple[Adapter, ...]:
    """The same adapters of other tensors, in the order of `flat_adapters`."""
    pairs = zip(adapters, tensors[::2], tensors[1::2], strict=True)
    return tuple(adapter._replace(down=down, up=up) for adapter, down, up in pairs)


def adapter_names(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Of `flat_adapters`, those by which `Gradients` knows them."""
    return tuple(
        f"{adapter.projection}_{kind}{place}"
        for place, adapter in enumerate(adapters)
        for kind in ("down", "up")
    )


def check_adapter(adapter: Adapter, weight: Tensor) -> None:
    """Refuse an adapter that does not fit a projection's weight (D_out, D_in)."""
    name, (width, reads), rank = adapter.projection, weight.shape, len(adapter.down)
    if adapter.down.dim() != 2 or not rank or adapter.down.shape[1] != reads:
        got = tuple(adapter.down.shape)
        raise ValueError(f"down of {name}'s adapter must be (r, D_in) = (r, {reads}), got {got}")
    if adapter.up.dim() != 2 or adapter.up.shape[1] != rank:
        got = tuple(adapter.up.shape)
        raise ValueError(f"up of {name}'s adapter must be (outputs, r) = (.., {rank}), got {got}")
    if not 0 <= adapter.start < adapter.stop <= width:
        raise ValueError(
            f"{name}'s adapter must be added to some of outputs 0 to {width}, got {adapter.start} "
            f"to {adapter.stop}"
        )


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, rounded once."""
    return torch.addmm(left.new_zeros(1), left, right, beta=0, alpha=scale)


class Linear(NamedTuple):
    """Weight and bias of one projection, in the dtype of the branches, and its adapters."""

    weight: Tensor
    """(D_out, D_in)"""
    bias: Tensor | None = None
    """(D_out,)"""
    adapters: tuple[Adapter, ...] = ()
    adds: Ranks | None = None
    """Each of which has some of D_in: `of` is the sum of what they make, and the bias."""
    adds_back: Ranks | None = None
    """Each of which has some of D_out: `back` is the sum of what they make."""

    @property
    def width(self) -> int:
        """D_out."""
        return len(self.weight)

    def of(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(..., D_in) -> (..., D_out), into out (tokens, D_out) where it is given."""
        rows = as_rows(x)
        if self.adds is not None:
            y = self.part().of(rows, out=out)
            self.adds.sum(y)
            self.add_bias(y)
            return y.view(*x.shape[:-1], self.width)
        if self.bias is None:
            y = torch.mm(rows, self.weight.T, out=out)
        else:
            y = torch.addmm(self.bias, rows, self.weight.T, out=out)
        self._adapt(rows, y)
        return y.view(*x.shape[:-1], self.width)

    def back(self, dy: Tensor, *, out: Tensor | None = None) -> Tensor:
        """dx (..., D_in) from dy (..., D_out), into out (tokens, D_in) where it is given."""
        rows = as_rows(dy)
        dx = torch.mm(rows, self.weight, out=out)
        self._adapt_back(rows, dx)
        sum_or_not(self.adds_back, dx)
        return dx.view(*dy.shape[:-1], self.weight.shape[1])

    def add_of(self, x: Tensor, total: Tensor) -> None:
        """total (..., D_out) += `of` x; of a `part`, where there are ranks."""
        assert self.adds is None
        total = as_rows(total).addmm_(as_rows(x), self.weight.T)
        if self.bias is not None:
            total += self.bias
        self._adapt(as_rows(x), total)

    def add_back(self, dy: Tensor, total: Tensor) -> None:
        """total (..., D_in) += `back` of dy; of a `part`, where there are ranks."""
        assert self.adds_back is None
        total = as_rows(total).addmm_(as_rows(dy), self.weight)
        self._adapt_back(as_rows(dy), total)

    def _adapt(self, x: Tensor, y: Tensor) -> None:
        """Add what the adapters make of x (tokens, D_in)."""
        for adapter in self.adapters:
            adapter.seen(y).addmm_(adapter.narrow(x), adapter.up.T)

    def _adapt_back(self, dy: Tensor, dx: Tensor) -> None:
        """Add what dy (tokens, D_out) makes of the adapters."""
        for adapter in self.adapters:
            dx.addmm_(adapter.narrow_back(dy), adapter.down)

    def part(self) -> "Linear":
        """What this rank adds to the sum, without the bias of a sum; itself where it is whole."""
        bias = self.bias if self.adds is None else None
        return self._replace(bias=bias, adds=None, adds_back=None)

    def add_bias(self, y: Tensor) -> None:
        """To a sum y (..., D_out) of what `part` makes on each rank."""
        if self.adds is not None and self.bias is not None:
            y += self.bias

    def rows(self, start: int, stop: int | None) -> "Linear":
        """Of some of its outputs, the `part` of this rank."""
        bias = None if self.bias is None else self.bias[start:stop]
        weight = self.weight[start:stop]
        cut = (adapter.rows(start, start + len(weight)) for adapter in self.adapters)
        return Linear(weight, bias, tuple(adapter for adapter in cut if adapter is not None))
