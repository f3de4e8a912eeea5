"""Queries, keys and values of a layer, with a query of every token or of its first ones alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.layer.first_tokens import first_tokens
from dbkernels.ops.layer.projection import Gradients, as_rows, project, sum_dtype, write_product
from dbkernels.ops.layer.tensors import LayerWeights


class QKV(NamedTuple):
    """One tensor, or two where only the first N tokens have queries; so are their gradients."""

    q: Tensor | None
    """(B, N, D), or None."""
    qkv: Tensor
    """(B, T, 3 D), or keys and values alone (B, T, 2 D)."""

    def by_head(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, N or T, D / H) each, views."""
        B, T, width = self.qkv.shape
        parts = 3 if self.q is None else 2
        d = width // (parts * heads)
        views = self.qkv.view(B, T, parts, heads, d).permute(2, 0, 3, 1, 4)
        if self.q is None:
            return views.unbind()
        return self.q.view(B, self.q.shape[1], heads, d).transpose(1, 2), *views.unbind()

    def write(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Gradients by head, (B, H, N or T, d) each, which lie token by token: side by side."""
        parts = [t.transpose(1, 2).flatten(0, 1).flatten(1) for t in (dq, dk, dv)]
        if self.q is not None:
            as_rows(self.q).copy_(parts.pop(0))
        torch.cat(parts, dim=1, out=as_rows(self.qkv))

    def whole(self) -> Tensor:
        """(B, T, 3 D), with zeros for the queries that are not there."""
        if self.q is None:
            return self.qkv
        B, N, D = self.q.shape
        whole = self.qkv.new_zeros((B, self.qkv.shape[1], 3 * D))
        whole[:, :N, :D] = self.q
        whole[..., D:] = self.qkv
        return whole

    def take(self, whole: Tensor) -> None:
        """What was done to `whole`, done here."""
        if self.q is not None:
            _, N, D = self.q.shape
            self.q.copy_(whole[:, :N, :D])
            self.qkv.copy_(whole[..., D:])


def project_qkv(y: Tensor, w: LayerWeights, num_queries: int | None) -> QKV:
    """Of y (B, T, D), with queries of its first tokens, or None for all."""
    if num_queries is None:
        return QKV(None, project(y, w.qkv_weight, w.qkv_bias))
    (q_weight, kv_weight), (q_bias, kv_bias) = _apart(w.qkv_weight), _apart(w.qkv_bias)
    return QKV(
        project(first_tokens(y, num_queries), q_weight, q_bias), project(y, kv_weight, kv_bias)
    )


def project_qkv_backward(dqkv: QKV, w: LayerWeights) -> Tensor:
    """dy (B, T, D)."""
    if dqkv.q is None:
        return project(dqkv.qkv, w.qkv_weight.T)
    q_weight, kv_weight = _apart(w.qkv_weight)
    dy = project(dqkv.qkv, kv_weight.T)
    dy[:, : dqkv.q.shape[1]] += project(dqkv.q, q_weight.T)
    return dy


def add_qkv(gradients: Gradients, dqkv: QKV, y: Tensor) -> None:
    """The gradient of the projection's weight and bias."""
    if dqkv.q is None:
        gradients.add_projection("qkv", dqkv.qkv, y)
        return
    _, N, D = dqkv.q.shape
    dq, dkv = as_rows(dqkv.q), as_rows(dqkv.qkv)
    if "qkv_weight" in gradients.wanted:
        # whole from the start: its parts beside it would be the step's highest moment
        total = y.new_empty((3 * D, D), dtype=statistics_dtype(y))
        write_product(total[:D], dq.T, as_rows(first_tokens(y, N)))
        write_product(total[D:], dkv.T, as_rows(y))
        gradients.add("qkv_weight", total)
    if "qkv_bias" in gradients.wanted:
        dtype = sum_dtype(dq, gradients.dtype)
        sums = [part.sum(0, dtype=dtype) for part in (dq, dkv)]
        gradients.add("qkv_bias", torch.cat(sums))


def _apart(parameter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The queries' third of its rows, and the others."""
    if parameter is None:
        return None, None
    D = len(parameter) // 3
    return parameter[:D], parameter[D:]
