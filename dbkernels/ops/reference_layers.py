"""Layers beside the AdaLN layer in plain torch: with `reference`, the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.ops import reference
from dbkernels.ops.layer.tensors import LayerWeights

ACTIVATIONS = {
    "gelu": reference.gelu,
    "gelu_exact": reference.gelu_exact,
    "swiglu": reference.swiglu,
}


def parallel_layer(
    x: Tensor,
    modulation: Tensor,
    weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: str = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
) -> Tensor:
    w, dtype = weights, weights.qkv_weight.dtype
    shift, scale, gate = modulation.chunk(3, dim=-1)
    y = reference.adaln_norm(x, scale, shift, norm=norm, eps=eps).to(dtype)
    attended = self_attention(y, w, num_heads, rotary, qk_eps)
    activated = ACTIVATIONS[mlp](reference.projected(y, w.fc1))
    weight, bias = torch.cat([w.out_weight, w.fc2_weight], dim=1), w.fc2_bias
    if w.out_bias is not None:
        bias = w.out_bias if bias is None else bias + w.out_bias
    h = F.linear(torch.cat([attended, activated], dim=-1), weight, bias)
    h = reference.adapted(reference.adapted(h, attended, w.out), activated, w.fc2)
    return reference.gated_residual(x, h, gate).to(x.dtype)


def self_attention(
    y: Tensor, w: LayerWeights, num_heads: int, rotary: Tensor | None, qk_eps: float
) -> Tensor:
    """(B, T, H d), of y (B, T, D), before its projection out."""
    qkv = reference.projected(y, w.qkv)
    norms = {"q_weight": w.q_weight, "k_weight": w.k_weight, "eps": qk_eps}
    q, k = reference.qk_norm_rotary(qkv, num_heads, **norms, rotary=rotary)
    v = qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]
    return attend(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N, H d), of q (B, N, H, d) and k, v (B, S, H, d), by torch's own attention."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """(B, N, H, d), of q (B, N, H, d) and k, v (B, S, H, d); 0 where a sample has no key."""
    S, nothing = k.shape[1], torch.zeros_like(q)
    if not S:
        return nothing
    if lengths is None:
        return attend(q, k, v).view(q.shape)
    some = (lengths > 0)[:, None, None, None]
    # a row without a key would be NaN, and its gradient too
    seen = torch.arange(S, device=q.device) < lengths.clamp(min=1)[:, None]
    return torch.where(some, attend(q, k, v, seen[:, None, None]).view(q.shape), nothing)


def cross_layer(
    x: Tensor,
    modulation: Tensor,
    context: Tensor,
    weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    lengths: Tensor | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: str = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
) -> Tensor:
    w, dtype = weights, weights.qkv_weight.dtype
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    y = reference.adaln_norm(x, scale1, shift1, norm=norm, eps=eps).to(dtype)
    h = F.linear(self_attention(y, w, num_heads, rotary, qk_eps), w.out_weight, w.out_bias)
    x = reference.gated_residual(x, h, gate1).to(x.dtype)
    q = F.linear(x.to(dtype), w.cross_q_weight, w.cross_q_bias).unflatten(-1, (num_heads, -1))
    kv = F.linear(context.to(dtype), w.cross_kv_weight, w.cross_kv_bias)
    k, v = kv.unflatten(-1, (2, num_heads, -1)).unbind(2)
    h = cross_attention(q, k, v, lengths=lengths).flatten(2)
    x = (x + F.linear(h, w.cross_out_weight, w.cross_out_bias)).to(x.dtype)
    y = reference.adaln_norm(x, scale2, shift2, norm=norm, eps=eps).to(dtype)
    h = ACTIVATIONS[mlp](F.linear(y, w.fc1_weight, w.fc1_bias))
    return reference.gated_residual(x, F.linear(h, w.fc2_weight, w.fc2_bias), gate2).to(x.dtype)
