"""Layers beside the AdaLN layer in plain torch: with `reference`, the specification."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.ops import reference
from dbkernels.ops.layer.weights import LayerWeights

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
    w, context_w, dtype = weights, context_weights, weights.qkv_weight.dtype
    normed = partial(reference.adaln_norm, norm=norm, eps=eps)
    keys_only, T = context_w.out_weight is None, context.shape[1]
    parts = modulation.chunk(6 if second_weights is None else 9, dim=-1)
    of_context = context_modulation.chunk(2 if keys_only else 6, dim=-1)
    # the published code has the scale first where there is nothing else
    scale, shift = of_context if keys_only else of_context[1::-1]
    y, z = normed(x, parts[1], parts[0]).to(dtype), normed(context, scale, shift).to(dtype)

    of_z, of_y = (None, None) if rotary is None else (rotary[:, :T], rotary[:, T:])
    heads = zip(
        heads_of(z, context_w, num_heads, of_z, qk_eps),
        heads_of(y, w, num_heads, of_y, qk_eps),
        strict=True,
    )
    h = attend(*(torch.cat(pair, dim=1) for pair in heads))

    x1 = reference.gated_residual(x, reference.projected(h[:, T:], w.out), parts[2])
    if second_weights is not None:
        shift3, scale3, gate3 = parts[6:]
        y2 = normed(x, scale3, shift3).to(dtype)
        a2 = self_attention(y2, second_weights, num_heads, None, qk_eps)
        a2 = reference.projected(a2, second_weights.out)
        x1 = reference.gated_residual(x1.to(x.dtype), a2, gate3)
    out = add_mlp(x1.to(x.dtype), parts[3:6], w, mlp, normed)
    if keys_only:
        return out, None
    b = reference.projected(h[:, :T], context_w.out)
    context1 = reference.gated_residual(context, b, of_context[2]).to(x.dtype)
    return out, add_mlp(context1, of_context[3:], context_w, mlp, normed)


def add_mlp(
    x: Tensor, parts: Sequence[Tensor], w: LayerWeights, mlp: str, normed: Callable[..., Tensor]
) -> Tensor:
    """The stream with its MLP's output; parts are shift, scale and gate."""
    shift, scale, gate = parts
    y = normed(x, scale, shift).to(w.qkv_weight.dtype)
    h = ACTIVATIONS[mlp](reference.projected(y, w.fc1))
    return reference.gated_residual(x, reference.projected(h, w.fc2), gate).to(x.dtype)


def self_attention(
    y: Tensor, w: LayerWeights, num_heads: int, rotary: Tensor | None, qk_eps: float
) -> Tensor:
    """(B, T, H d), of y (B, T, D), before its projection out."""
    return attend(*heads_of(y, w, num_heads, rotary, qk_eps))


def heads_of(
    y: Tensor, w: LayerWeights, num_heads: int, rotary: Tensor | None, qk_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as an attention sees them, and values, (B, T, H, d) each."""
    qkv = reference.projected(y, w.qkv)
    norms = {"q_weight": w.q_weight, "k_weight": w.k_weight, "eps": qk_eps}
    q, k = reference.qk_norm_rotary(qkv, num_heads, **norms, rotary=rotary)
    return q, k, qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]


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
    h = reference.projected(self_attention(y, w, num_heads, rotary, qk_eps), w.out)
    x = reference.gated_residual(x, h, gate1).to(x.dtype)
    q = reference.projected(x.to(dtype), w.cross_q).unflatten(-1, (num_heads, -1))
    kv = reference.projected(context.to(dtype), w.cross_kv)
    k, v = kv.unflatten(-1, (2, num_heads, -1)).unbind(2)
    h = cross_attention(q, k, v, lengths=lengths).flatten(2)
    x = (x + reference.projected(h, w.cross_out)).to(x.dtype)
    y = reference.adaln_norm(x, scale2, shift2, norm=norm, eps=eps).to(dtype)
    h = ACTIVATIONS[mlp](reference.projected(y, w.fc1))
    return reference.gated_residual(x, reference.projected(h, w.fc2), gate2).to(x.dtype)
