"""Queries, keys and values of a layer, with a query of every token or of some alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.layer.gradients import Gradients, product
from dbkernels.ops.layer.linear import Linear, as_rows
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.ranks import sum_or_not


class QKV(NamedTuple):
    """One tensor, or two where only n samples' first N tokens have queries; so are gradients."""

    q: Tensor | None
    """(n, N, H d), or None."""
    qkv: Tensor
    """(B, T, 3 H d), or keys and values alone (B, T, 2 H d)."""

    @property
    def queries(self) -> int:
        """N."""
        return (self.qkv if self.q is None else self.q).shape[1]

    def by_head(self, heads: int) -> list[Tensor]:
        """(n or B, H, N or T, d) each, views."""
        there = [t for t in self if t is not None]
        width = sum(t.shape[-1] for t in there) // 3
        each = (t.view(*t.shape[:2], t.shape[-1] // width, heads, width // heads) for t in there)
        return [view for views in each for view in views.permute(2, 0, 3, 1, 4)]

    def write(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Gradients by head, as `by_head`, which lie token by token: side by side."""
        parts = [t.transpose(1, 2).flatten(2) for t in (dq, dk, dv)]
        if self.q is not None:
            self.q.copy_(parts.pop(0))
        torch.cat(parts, dim=2, out=self.qkv)

    def whole(self) -> Tensor:
        """(B, T, 3 H d), with zeros for the queries that are not there."""
        if self.q is None:
            return self.qkv
        width = self.q.shape[-1]
        whole = torch.nn.functional.pad(self.qkv, (width, 0))
        self._queried(whole)[..., :width] = self.q
        return whole

    def take(self, whole: Tensor) -> None:
        """What was done to `whole`, done here."""
        if self.q is not None:
            width = self.q.shape[-1]
            self.q.copy_(self._queried(whole)[..., :width])
            self.qkv.copy_(whole[..., width:])

    def _queried(self, t: Tensor) -> Tensor:
        """Those of (B, T, ...) that have a query."""
        n, N, _ = self.q.shape
        return t[:n, :N]

    @classmethod
    def of(cls, y: Tensor, qkv: Linear, wanted: Wanted) -> "QKV":
        """Of y (B, T, D), with queries of those whose results are wanted."""
        if wanted.is_all:
            return cls(None, qkv.of(y))
        of_q, of_kv = _apart(qkv)
        return cls(of_q.of(wanted.of(y)), of_kv.of(y))

    def backward(self, qkv: Linear) -> Tensor:
        """dy (B, T, D), where this is the gradient."""
        if self.q is None:
            return qkv.back(self.qkv)
        of_q, of_kv = _apart(qkv)
        dy = of_kv.back(self.qkv)
        self._queried(dy).add_(of_q.back(self.q))
        sum_or_not(qkv.adds_back, dy)
        return dy

    def add_to(self, gradients: Gradients, y: Tensor) -> None:
        """Those of the projection's weight and bias, where this is the gradient."""
        if self.q is None:
            gradients.add_weight("qkv", self.qkv, y)
            gradients.add_bias("qkv", self.qkv)
            return
        gradients.add_bias("qkv", self.q, self.qkv)
        if not gradients.wants("qkv"):
            return
        width, queried = self.q.shape[-1], self._queried(y).contiguous()
        gradients.add_adapters("qkv", self.q, queried)
        gradients.add_adapters("qkv", self.qkv, y, start=width)
        if "qkv_weight" in gradients.wanted:
            # whole from the start: its parts beside it would be the step's highest moment
            total = y.new_empty((3 * width, y.shape[-1]), dtype=checks.statistics_dtype(y))
            of_q, of_kv = total[:width], total[width:]
            product(as_rows(self.q).T, as_rows(queried), total.dtype, out=of_q)
            product(as_rows(self.qkv).T, as_rows(y), total.dtype, out=of_kv)
            gradients.add("qkv_weight", total)


def _apart(qkv: Linear) -> tuple[Linear, Linear]:
    """To queries, and to keys and values."""
    width = qkv.width // 3
    return qkv.rows(0, width), qkv.rows(width, None)
