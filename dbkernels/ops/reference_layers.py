"""Layers of other kinds than `reference.adaln_layer`, in plain torch: their specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.ops.layer.tensors import LayerWeights
from dbkernels.ops.reference import (
    adaln_norm,
    gated_residual,
    gelu,
    gelu_exact,
    qk_norm_rotary,
    swiglu,
)

ACTIVATIONS = {"gelu": gelu, "gelu_exact": gelu_exact, "swiglu": swiglu}


def heads_of(
    y: Tensor, w: LayerWeights, num_heads: int, rotary: Tensor | None, qk_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as an attention sees them, and values, (B, T, H, d) each."""
    qkv = F.linear(y.to(w.qkv_weight.dtype), w.qkv_weight, w.qkv_bias)
    v = qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]
    norms = {"q_weight": w.q_weight, "k_weight": w.k_weight, "eps": qk_eps}
    return *qk_norm_rotary(qkv, num_heads, **norms, rotary=rotary), v


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, H, d) each -> (B, T, H d), by torch's own attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp_of(y: Tensor, w: LayerWeights, mlp: str) -> Tensor:
    u = F.linear(y.to(w.qkv_weight.dtype), w.fc1_weight, w.fc1_bias)
    return F.linear(ACTIVATIONS[mlp](u), w.fc2_weight, w.fc2_bias)


def joint_layer(
    x: Tensor,
    context: Tensor,
    modulation: Tensor,
    context_modulation: Tensor,
    weights: LayerWeights,
    context_weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    second_weights: LayerWeights | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: str = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    def normed(t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return adaln_norm(t, scale, shift, norm=norm, eps=eps)

    def leave(
        t: Tensor, w: LayerWeights, h: Tensor, parts: tuple[Tensor, ...], *more: Tensor
    ) -> Tensor:
        gate1, shift2, scale2, gate2 = parts[2:6]
        a = F.linear(h, w.out_weight, w.out_bias)
        t = gated_residual(t, a, gate1).to(t.dtype)
        for gate, branch in zip(more[::2], more[1::2], strict=True):
            t = gated_residual(t, branch, gate).to(t.dtype)
        return gated_residual(t, mlp_of(normed(t, scale2, shift2), w, mlp), gate2).to(t.dtype)

    keys_only, T = context_weights.out_weight is None, context.shape[1]
    parts = modulation.chunk(6 if second_weights is None else 9, dim=-1)
    of_context = context_modulation.chunk(2 if keys_only else 6, dim=-1)
    tables = (None, None) if rotary is None else (rotary[:, :T], rotary[:, T:])
    # the published code has the scale first where there is nothing else
    z = normed(context, *(of_context if keys_only else of_context[1::-1]))
    y = normed(x, *parts[1::-1])
    both = [
        torch.cat(pair, dim=1)
        for pair in zip(
            heads_of(z, context_weights, num_heads, tables[0], qk_eps),
            heads_of(y, weights, num_heads, tables[1], qk_eps),
            strict=True,
        )
    ]
    h = attended(*both)
    more = ()
    if second_weights is not None:
        shift3, scale3, gate3 = parts[6:]
        heads = heads_of(normed(x, scale3, shift3), second_weights, num_heads, None, qk_eps)
        w = second_weights
        more = gate3, F.linear(attended(*heads), w.out_weight, w.out_bias)
    x = leave(x, weights, h[:, T:], parts, *more)
    return x, None if keys_only else leave(context, context_weights, h[:, :T], of_context)
