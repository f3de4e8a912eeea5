"""The attention branch of a layer: projection to q, k and v, attention, projection out."""

import torch
from torch import Tensor

from dbkernels.ops._layer_tensors import LayerWeights
from dbkernels.ops._projection import Gradients, project
from dbkernels.ops.attention import attention_backward, attention_forward
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

QK_EPS = 1e-6  # of the norms of queries and keys


def attend(
    qkv: Tensor, heads: int, w: LayerWeights, rotary: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The attention's result (B, T, D) and its logsumexp, from qkv (B, T, 3 D)."""
    return attention_forward(*_by_head(qkv, heads, w, rotary))


def attention_branch_backward(
    da: Tensor,
    qkv: Tensor,
    attended: Tensor | None,
    logsumexp: Tensor | None,
    heads: int,
    w: LayerWeights,
    rotary: Tensor | None,
    *,
    dqkv: Tensor,
    gradients: Gradients,
) -> None:
    """From the gradient of the branch's output to dqkv (B, T, 3 D), which is written.

    dqkv may be qkv itself where queries and keys have no norm, whose backward reads qkv again.
    Where attended is None, it is computed again.
    """
    by_head = _by_head(qkv, heads, w, rotary)
    if attended is None:
        attended, logsumexp = attention_forward(*by_head)
    gradients.add_projection("out", da, attended)
    dattended = project(da, w.out_weight.T)
    parts = attention_backward(dattended, *by_head, attended, logsumexp)
    for whole, part in zip(_split(dqkv, heads), parts, strict=True):
        whole.copy_(part)
    if w.q_weight is None and rotary is None:
        return
    norms = [None if weight is None else torch.empty_like(weight) for weight in w.qk_norms]
    qk_norm_rotary_backward(
        dqkv, qkv, heads, *w.qk_norms, rotary, QK_EPS, dq_weight=norms[0], dk_weight=norms[1]
    )
    for name, gradient in zip(("q_weight", "k_weight"), norms, strict=True):
        if name in gradients.wanted:
            gradients.add(name, gradient)


def _by_head(
    qkv: Tensor, heads: int, w: LayerWeights, rotary: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the attention sees them, and values, (B, H, T, D / H) each."""
    q, k, v = _split(qkv, heads)
    if w.q_weight is not None or rotary is not None:
        qk = qk_norm_rotary_forward(qkv, heads, *w.qk_norms, rotary, QK_EPS)
        q, k = qk.permute(2, 0, 3, 1, 4)
    return q, k, v


def _split(qkv: Tensor, heads: int) -> Tensor:
    """(3, B, H, T, D / H), a view of (B, T, 3 D)."""
    B, T, D = qkv.shape
    return qkv.view(B, T, 3, heads, D // (3 * heads)).permute(2, 0, 3, 1, 4)
