"""The attention branch of a layer after its projection to q, k and v: attention, projection out."""

import torch
from torch import Tensor

from dbkernels.ops.attention import attention_backward, attention_forward
from dbkernels.ops.layer.projection import Gradients, project
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.tensors import LayerWeights
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

QK_EPS = 1e-6  # of the norms of queries and keys


def attend(qkv: QKV, heads: int, w: LayerWeights, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention's result (B, N, D) and its logsumexp, for N queries of each sample."""
    return attention_forward(*_by_head(qkv, heads, w, rotary))


def attention_branch_backward(
    da: Tensor,
    qkv: QKV,
    attended: Tensor | None,
    logsumexp: Tensor | None,
    heads: int,
    w: LayerWeights,
    rotary: Tensor | None,
    *,
    dqkv: QKV,
    gradients: Gradients,
) -> None:
    """From the gradient of the branch's output to dqkv, which is written.

    dqkv may be qkv itself where queries and keys have no norm, whose backward reads qkv again.
    Where attended is None, it is computed again.
    """
    by_head = _by_head(qkv, heads, w, rotary)
    if attended is None:
        attended, logsumexp = attention_forward(*by_head)
    gradients.add_projection("out", da, attended)
    dattended = project(da, w.out_weight.T)
    dqkv.write(*attention_backward(dattended, *by_head, attended, logsumexp))
    if w.q_weight is None and rotary is None:
        return
    whole = dqkv.whole()
    norms = [None if weight is None else torch.empty_like(weight) for weight in w.qk_norms]
    qk_norm_rotary_backward(
        whole, qkv.whole(), heads, *w.qk_norms, rotary, QK_EPS,
        dq_weight=norms[0], dk_weight=norms[1],
    )  # fmt: skip
    dqkv.take(whole)
    for name, gradient in zip(("q_weight", "k_weight"), norms, strict=True):
        if name in gradients.wanted:
            gradients.add(name, gradient)


def _by_head(
    qkv: QKV, heads: int, w: LayerWeights, rotary: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the attention sees them, and values, (B, H, N or T, D / H) each."""
    q, k, v = qkv.by_head(heads)
    if w.q_weight is not None or rotary is not None:
        N = q.shape[2]
        qk = qk_norm_rotary_forward(qkv.whole(), heads, *w.qk_norms, rotary, QK_EPS)
        q, k = qk.permute(2, 0, 3, 1, 4)
        q = q[:, :, :N]
    return q, k, v
