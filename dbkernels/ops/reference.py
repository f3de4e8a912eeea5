"""Every op in plain torch. This file is the specification: kernels are tested against it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.ops.backend.noise_tile import DROPOUT
from dbkernels.ops.layer.linear import Linear
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.ops.philox import Draw, counter_words, key_words, philox, sizes


def normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def over_tokens(modulation: Tensor) -> Tensor:
    """(B, D) as (B, 1, D); (B, T, D) as it is."""
    return modulation[:, None] if modulation.dim() == 2 else modulation


def adaln_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6
) -> Tensor:
    return (1 + over_tokens(scale)) * normalise(x, norm, eps) + over_tokens(shift)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return x + over_tokens(gate) * h


def gated_adaln_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    x1 = gated_residual(x, h, gate)
    return x1, adaln_norm(x1, scale, shift, norm=norm, eps=eps)


def projected(x: Tensor, linear: Linear) -> Tensor:
    if (ranks := linear.adds or linear.adds_back) is not None:
        raise ValueError(f"ranks must be None in plain torch, got {ranks.size} ranks")
    return adapted(F.linear(x, linear.weight, linear.bias), x, linear)


def adapted(y: Tensor, x: Tensor, linear: Linear) -> Tensor:
    """With what the adapters of a projection make of x."""
    for adapter in linear.adapters:
        down, up = (t.to(x.dtype) for t in (adapter.down, adapter.up))
        h = adapter.scale * F.linear(F.linear(x, down), up)
        y = y + F.pad(h, (adapter.start, linear.width - adapter.stop))
    return y


def biased(h: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of h, as a projection adds it."""
    return h if bias is None else h + bias.to(h.dtype)


def gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(biased(h, bias), approximate="tanh")


def gelu_exact(h: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(biased(h, bias))


def swiglu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    a, b = biased(h, bias).chunk(2, dim=-1)
    return F.silu(a) * b


def qk_norm_rotary(
    qkv: Tensor,
    heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rotary: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # (B, T, H, d)
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], q_weight.to(q.dtype), eps)
        k = F.rms_norm(k, k.shape[-1:], k_weight.to(k.dtype), eps)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return q, k


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x (B, T, H, d) by the angles of a table (2, T, d)."""
    cos, sin = rotary[:, :, None]
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    return masked_attention(q, k, v, causal_mask(q) if causal else None)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """mask is true where a query (rows) sees a key (columns); None is everywhere."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def two_stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    noisy_q, clean_q = q.tensor_split(2)
    clean_k, clean_v = (x.tensor_split(2)[1] for x in (k, v))
    noisy = masked_attention(noisy_q, *both_streams(k, v), two_stream_mask(noisy_q))
    return torch.cat([noisy, attention(clean_q, clean_k, clean_v, causal=True)])


def both_streams(*tensors: Tensor) -> list[Tensor]:
    """(2B, T, H, d) as (B, 2T, H, d): the noisy tokens of a sample, and then its clean ones."""
    return [torch.cat(x.tensor_split(2), 1) for x in tensors]


def causal_mask(q: Tensor) -> Tensor:
    """(T, T), of q (B, T, H, d)."""
    T = q.shape[1]
    return torch.ones(T, T, dtype=torch.bool, device=q.device).tril()


def two_stream_mask(q: Tensor) -> Tensor:
    """(T, 2T), of noisy q (B, T, H, d): each sees itself, and clean tokens up to its place."""
    own = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
    return torch.cat([own, causal_mask(q)], 1)


def dropout(x: Tensor, p: float, draw: Draw, *, place: int = 0) -> Tensor:
    seed, step, sample = draw.arguments(*sizes(x), x.device)
    group = torch.arange(-(-sizes(x)[1] // 4), device=x.device)
    samples = torch.arange(sample, sample + len(x), device=x.device)[:, None]
    words = philox(group, samples, *counter_words(step, DROPOUT + place), *key_words(seed))
    words = torch.stack(words, -1).flatten(1)[:, : sizes(x)[1]].view(x.shape)
    return torch.where(words >= round(p * 2**32), x / (1 - p), 0)


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, p: float, draw: Draw) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).transpose(1, 2)  # by query
    return (dropout(weights.contiguous(), p, draw).transpose(1, 2) @ v).transpose(1, 2)


def adaln_layer(
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
    eps2: float | None = None,
    qk_eps: float = 1e-6,
    num_queries: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    draw: Draw | None = None,
    attention: str = "full",
    num_samples: int | None = None,
) -> Tensor:
    leave_out = partial(_leave_out, p=dropout, draw=draw, streams=1 + (attention == "two_stream"))
    w, dtype = weights, weights.qkv_weight.dtype
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    y = adaln_norm(x, scale1, shift1, norm=norm, eps=eps).to(dtype)
    qkv = projected(y, w.qkv)
    norms = {"q_weight": w.q_weight, "k_weight": w.k_weight, "eps": qk_eps}
    q, k = qk_norm_rotary(qkv, num_heads, **norms, rotary=rotary)
    v = qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2]
    if attention_dropout:
        h = dropped_attention(q, k, v, attention_dropout, draw).flatten(2)
    else:
        h = _attend(q, k, v, attention).flatten(2)
    h = leave_out(projected(h, w.out), place=1)
    x = gated_residual(x, h, gate1).to(x.dtype)
    y = adaln_norm(x, scale2, shift2, norm=norm, eps=eps if eps2 is None else eps2).to(dtype)
    activation = {"gelu": gelu, "gelu_exact": gelu_exact, "swiglu": swiglu}[mlp]
    h = projected(activation(projected(y, w.fc1)), w.fc2)
    return gated_residual(x, leave_out(h, place=2), gate2).to(x.dtype)[:num_samples, :num_queries]


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: str) -> Tensor:
    """By torch's own attention, which chooses a kernel."""
    if attention != "two_stream":
        return _fused(q, k, v, is_causal=attention == "causal")
    noisy_q, clean_q = q.tensor_split(2)
    clean = (x.tensor_split(2)[1] for x in (k, v))
    noisy = _fused(noisy_q, *both_streams(k, v), attn_mask=two_stream_mask(noisy_q))
    return torch.cat([noisy, _fused(clean_q, *clean, is_causal=True)])


def _fused(q: Tensor, k: Tensor, v: Tensor, **told: Tensor | bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **told).transpose(1, 2)


def _leave_out(h: Tensor, *, p: float, draw: Draw | None, streams: int, place: int) -> Tensor:
    if not p:
        return h
    # a stream has masks of its own, and in it a sample its number
    parts = [
        dropout(x, p, draw, place=place + 2 * i) for i, x in enumerate(h.tensor_split(streams))
    ]
    return torch.cat(parts) if streams > 1 else parts[0]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    logits = F.linear(x.to(weight.dtype).reshape(-1, x.shape[-1]), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = {"ignore_index": ignore_index, "reduction": "none"}
    losses = F.cross_entropy(logits, target.flatten(), **options).view(target.shape)
    if token_weight is not None:
        losses = losses * token_weight
    if reduction == "mean":
        return losses.sum() / (target != ignore_index).sum().clamp_min(1)
    return losses.sum() if reduction == "sum" else losses


def over_elements(coefficient: Tensor, z0: Tensor) -> Tensor:
    """(B,) or (B, T) against (B, T, ...)."""
    return coefficient.view(*coefficient.shape, *[1] * (z0.dim() - coefficient.dim()))


def add_noise(z0: Tensor, p: Tensor, q: Tensor, noise: Tensor) -> Tensor:
    return over_elements(p, z0) * z0 + over_elements(q, z0) * noise


def score_loss(
    prediction: Tensor,
    z0: Tensor,
    alpha: Tensor,
    beta: Tensor,
    noise: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    error = (prediction - add_noise(z0, alpha, beta, noise)) ** 2
    if weight is not None:
        error = error * over_elements(weight, z0)
    error = error.reshape(len(z0), -1)
    if mask is None:
        losses = error.mean(1)
    else:
        mask = over_elements(mask, z0).expand_as(z0).reshape(error.shape)
        losses = (error * mask).sum(1) / mask.sum(1).clamp_min(1)
    loss = {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()
    return loss, losses.detach()


def table_rows(table: Tensor, index: Tensor, *, unit: bool = False) -> Tensor:
    return F.embedding(index, F.normalize(table, dim=-1) if unit else table)
