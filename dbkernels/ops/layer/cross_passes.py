"""What a layer with cross-attention does with samples that run together, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.cross_attention import cross_attention_backward, cross_attention_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attention_branch import attend, attend_backward
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import as_rows
from dbkernels.ops.layer.mlp import mlp, mlp_backward
from dbkernels.ops.layer.modulation import LayerModulation
from dbkernels.ops.layer.passes import Kind, Streams, enter, enter_backward, qkv_of
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import Activations, Kept, LayerCall


def _write(streams: Streams, outs: Sequence[Tensor]) -> list[Activations]:
    (call,), (out,) = streams, outs
    w, options, mod, rows = call.weights, call.options, call.mod, call.by_sample
    keeps = POLICIES[options.recompute].keeps
    qkv, stats1 = enter(call)
    attended, logsumexp = attend(streams, (qkv,))
    a = w.out.of(attended)

    # nothing else sees x1 and x2, so the layer's output takes their place
    gated_residual_forward(rows(call.x), rows(a), mod.gate1, y=rows(out))
    q = w.cross_q.of(out.to(options.norm1.dtype))
    kv = w.cross_kv.of(call.context.tokens.to(options.norm1.dtype))
    seen, of_seen = cross_attention_forward(*_by_head(call, q, kv), call.context.lengths)
    c = w.cross_out.of(seen)
    out += c

    y, stats2 = _second_norm(call, out)
    hidden = y.new_empty((len(as_rows(y)), w.fc1.width)) if "hidden" in keeps else None
    m = mlp(y, options.mlp, w.fc1, w.fc2, hidden=hidden)
    gated_residual_forward(rows(out), rows(m), mod.gate2, y=rows(out))
    made = Activations(stats1, *qkv, attended, logsumexp, a, stats2, hidden, m)
    of_cross = {"cross_q": q, "cross_kv": kv, "cross_attended": seen, "cross_logsumexp": of_seen}
    return [made._replace(**of_cross, c=c).only(keeps)]


def _by_head(call: LayerCall, q: Tensor, kv: Tensor) -> list[Tensor]:
    """q (B, H, T, d), and k and v (B, H, S, d): views."""
    heads = call.options.num_heads, q.shape[-1] // call.options.num_heads
    k, v = kv.view(*kv.shape[:2], 2, *heads).permute(2, 0, 3, 1, 4)
    return [q.view(*q.shape[:2], *heads).transpose(1, 2), k, v]


def _second_norm(call: LayerCall, x2: Tensor) -> tuple[Tensor, Tensor]:
    """y2 (B, T, D) and its statistics."""
    mod, rows = call.mod, call.by_sample(x2)
    y, stats = adaln_norm_forward(call.options.norm2, rows, mod.scale2, mod.shift2)
    return y.view(x2.shape), stats


def _after_attention(call: LayerCall, a: Tensor) -> Tensor:
    """x1 (B, T, D), in the dtype of the stream."""
    x1, rows = torch.empty_like(call.x), call.by_sample
    gated_residual_forward(rows(call.x), rows(a), call.mod.gate1, y=rows(x1))
    return x1


def _gradients(
    streams: Streams,
    douts: Sequence[Tensor],
    all_kept: Sequence[Kept],
    all_grads: Sequence[Gradients],
) -> tuple[list[Tensor], list[Tensor]]:
    """dx (B, T, D) and the gradient of the modulation."""
    (call,), (dout,), (kept,), (grads,) = streams, douts, all_kept, all_grads
    dmodulation = torch.empty_like(call.modulation)
    dmod, rows, a = LayerModulation.of(dmodulation), call.by_sample, kept["a"]
    q, kv = kept.pop("cross_q"), kept.pop("cross_kv")
    made_again = q is None
    x = _after_attention(call, a)
    if made_again:
        w, dtype = call.weights, call.options.norm1.dtype
        q, kv = w.cross_q.of(x.to(dtype)), w.cross_kv.of(call.context.tokens.to(dtype))
    x += kept["c"]
    dx2 = _mlp_backward(call, dout, x, dmod, kept, grads)
    del x
    buffers = (q, kv) if made_again else map(kept.buffer, (q, kv))
    dx1 = _cross_backward(call, dx2, q, kv, *buffers, kept, grads)
    del q, kv, dx2
    da = kept.buffer(a)
    gated_residual_backward(rows(dx1), rows(a), call.mod.gate1, dh=rows(da), dgate=dmod.gate1)
    del a, kept["a"]
    qkv = qkv_of(call, kept)
    (dqkv,) = attend_backward(streams, (da,), (qkv,), all_kept, all_grads)
    dx = enter_backward(call, dqkv, dx1, kept.pop("stats1"), dmodulation, grads)
    return [dx], [dmodulation]


def _mlp_backward(
    call: LayerCall,
    dout: Tensor,
    x2: Tensor,
    dmod: LayerModulation,
    kept: Kept,
    grads: Gradients,
) -> Tensor:
    """dx2 (B, T, D)."""
    w, options, mod, rows = call.weights, call.options, call.mod, call.by_sample
    m, y = kept.pop("m"), None
    dm = kept.buffer(m)
    gated_residual_backward(rows(dout), rows(m), mod.gate2, dh=rows(dm), dgate=dmod.gate2)
    if kept["hidden"] is None:
        y, _ = _second_norm(call, x2)
    dy, dhidden = mlp_backward(dm, y, options.mlp, w.fc1, w.fc2, kept, grads)
    del m, dm, y
    dx2, y = torch.empty_like(x2), None if dhidden is None else rows(dy)
    adaln_norm_backward(
        rows(dy), rows(dout), rows(x2), mod.scale2, mod.shift2, kept.pop("stats2"),
        rows(dx2), y, dmod.scale2, dmod.shift2, options.norm2.centred,
    )  # fmt: skip
    if dhidden is not None:
        grads.add_weight("fc1", dhidden, dy)  # y is written over dy by now
    return dx2


def _cross_backward(
    call: LayerCall,
    dx2: Tensor,
    q: Tensor,
    kv: Tensor,
    dq: Tensor,
    dkv: Tensor,
    kept: Kept,
    grads: Gradients,
) -> Tensor:
    """dx1, written over dx2; dq and dkv may be q and kv. The context's gradient is written too."""
    w, (tokens, lengths, dtokens) = call.weights, call.context
    seen, of_seen = kept.pop("cross_attended"), kept.pop("cross_logsumexp")
    by_head = _by_head(call, q, kv)
    if seen is None:
        seen, of_seen = cross_attention_forward(*by_head, lengths)
    dc = kept.buffer(kept.pop("c"))
    dc.copy_(dx2)
    grads.add_weight("cross_out", dc, seen)
    grads.add_bias("cross_out", dc)
    dseen = w.cross_out.back(dc)
    found = cross_attention_backward(dseen, *by_head, seen, of_seen, lengths)
    for grad, into in zip(found, _by_head(call, dq, dkv), strict=True):
        into.copy_(grad)
    del found, seen, dseen, dc, by_head
    grads.add_weight("cross_kv", dkv, tokens.to(dkv.dtype))
    grads.add_bias("cross_kv", dkv)
    if dtokens is not None:
        dtokens.copy_(w.cross_kv.back(dkv))
    grads.add_weight("cross_q", dq, _after_attention(call, kept["a"]).to(dq.dtype))
    grads.add_bias("cross_q", dq)
    if dq.dtype == dx2.dtype and w.ranks is None:
        w.cross_q.add_back(dq, dx2)
    else:
        dx2 += w.cross_q.back(dq)
    return dx2


CROSS = Kind("cross_layer", _write, _gradients)
