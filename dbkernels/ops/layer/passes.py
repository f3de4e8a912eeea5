"""One call of a layer: its forward, and its backward from whatever the policy kept.

`forward` and `backward` share the samples out, for any kind of layer; the rest is the AdaLN layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attend import attend_forward
from dbkernels.ops.layer.attention_branch import (
    AFTER_ATTENTION,
    AFTER_MLP,
    attend_backward,
    drop_branch,
    heads,
)
from dbkernels.ops.layer.condition import ConditionGradient, ModulationGradient
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import as_rows
from dbkernels.ops.layer.mlp import mlp, mlp_backward
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import (
    Activations,
    Kept,
    LayerCall,
    LayerModulation,
    by_sample,
    chunks,
)

PART = 4096  # tokens of the samples that run at a time: what they need is little beside the stream
GPU_PART = 8192  # where only q, k, v and hidden are made again, whose peak is no higher for it
FLOAT16_BITS = 15  # 2**15 is a number of float16, 2**16 is none


class Kind(NamedTuple):
    """What one kind of layer does with samples that run together."""

    name: str
    """Of its op, for errors."""
    write: Callable[[LayerCall, Tensor], Activations]
    """Its output into a tensor (n, N, D), and what its policy keeps."""
    gradients: Callable[[LayerCall, Tensor, Kept, Gradients], tuple[Tensor, Tensor]]
    """dx and the gradient of the modulation, from dout; kept is emptied as it is used up."""


def forward(kind: Kind, call: LayerCall) -> tuple[Tensor, Activations]:
    """The layer's output (n, N, D), and of its activations those that the policy keeps.

    A policy that keeps nothing runs a few samples at a time.
    """
    B, T, _ = call.x.shape
    out = call.x.new_empty(call.options.wanted.view(call.x).shape)
    # all samples together, also where they have no tokens
    tokens = max(B * T, B) if POLICIES[call.options.recompute].keeps else PART
    for part, some in call.parts(call.x.dtype, tokens):
        results = call.results(part)
        rows = results.of(out)
        kept = kind.write(some, rows)
        results.put_back(out, rows)
    return out, kept


def narrowed(call: LayerCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x in the dtype of the branches, less what a norm subtracts; x itself if that is no less.

    Around a mean that is large beside the rest, x would lose what the norm makes of it. In float16
    also by what each token was divided, (B, T, 1), a power of two, or 1 where it fits. For
    cross-attention, which reads the stream without a norm, also that mean, (B, T, 1).
    """
    x, norm = call.x, call.options.norm1
    if norm.dtype.itemsize >= x.dtype.itemsize:
        return x, None, None
    kept, of_tokens = torch.empty_like(x, dtype=norm.dtype), (*x.shape[:2], 1)
    scale = x.new_empty(of_tokens) if norm.dtype == torch.float16 else None
    means = x.new_empty(of_tokens) if norm.centred and call.context is not None else None
    B, T, _ = x.shape
    for samples in chunks(B, max(PART // max(T, 1), 1)):
        part = x[samples]
        if norm.centred:
            mean = part.mean(-1, keepdim=True)
            part = part - mean
            if means is not None:
                means[samples] = mean
        if scale is not None:
            exponent = torch.frexp(part.abs().amax(-1, keepdim=True)).exponent
            scale[samples] = torch.ldexp(scale.new_ones(()), (exponent - FLOAT16_BITS).clamp(min=0))
            part = part / scale[samples]
        kept[samples] = part
    return kept, scale, means


def backward(
    kind: Kind,
    call: LayerCall,
    dout: Tensor,
    kept: Kept,
    grads: Gradients,
    dmodulation: ModulationGradient | ConditionGradient,
) -> Tensor:
    """dx (B, T, D); the gradient of the modulation is added where it belongs.

    kept is emptied as it is used up. Without q, k and v, which the widest tensors of the
    attention's backward are made from, a few samples run at a time.
    """
    if kept["qkv"] is not None:
        dx, dmod = kind.gradients(call, dout, kept, grads)
        dmodulation.add(call.all_samples(), dmod)
        return dx
    dx = torch.empty_like(call.x, dtype=dout.dtype)
    size = GPU_PART if kept["a"] is not None and runs_as_on_gpu(dout) else PART
    for part, some in call.parts(dout.dtype, size, dmodulation.part):
        grads.parts, results = not part.is_all, call.results(part)
        own = Activations(*kept.values()).of(part, results)
        # copies are nobody else's
        own = Kept(own, owned=kept.owned or not results.is_together)
        if own["a"] is None:
            some = some._replace(options=some.options._replace(recompute="none"))
            own = Kept(forward(kind, some)[1], owned=True)
        dx_rows, dmod = kind.gradients(some, results.of(dout), own, grads)
        part.put(dx, dx_rows)
        dmodulation.add(part, dmod)
    kept.clear()
    return dx


def _write(call: LayerCall, out: Tensor) -> Activations:
    w, options, first, mod = call.weights, call.options, call.first(), call.mod
    keeps = POLICIES[options.recompute].keeps
    y, stats1 = first_norm(call, mod.scale1, mod.shift1)
    qkv = QKV.of(y, w.qkv, options.wanted)
    attended, logsumexp = attend_forward(options, *heads(call, qkv))
    a = drop_branch(call, w.out.of(attended), AFTER_ATTENTION)

    # nothing else sees x1, so the layer's output takes its place
    x1 = first.by_sample(out)
    y, stats2 = _second_norm(first, a, x1=x1)
    hidden = y.new_empty((len(as_rows(y)), w.fc1.width)) if "hidden" in keeps else None
    m = drop_branch(call, mlp(y, options.mlp, w.fc1, w.fc2, hidden=hidden), AFTER_MLP)
    gated_residual_forward(x1, first.by_sample(m), first.mod.gate2, y=x1)
    made = Activations(stats1, *qkv, attended, logsumexp, a, stats2, hidden, m)
    return made.only(keeps)


def first_norm(call: LayerCall, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """y1 (B, T, D) and its statistics."""
    y, stats = adaln_norm_forward(call.options.norm1, call.by_sample(call.x), scale, shift)
    return y.view(call.x.shape), stats


def _second_norm(call: LayerCall, a: Tensor, *, x1: Tensor | None) -> tuple[Tensor, Tensor]:
    """y2 (B, T, D) and its statistics; writes x1 where it is given."""
    x, h = map(call.by_sample, (call.x, a))
    y, stats = gated_adaln_norm_forward(call.options.norm2, x, h, *call.mod.between, x1)
    return y.view(call.x.shape), stats


def _at_once(call: LayerCall, dout: Tensor, kept: Kept, grads: Gradients) -> tuple[Tensor, Tensor]:
    """dx (B, T, D) and the gradient of the modulation, of all samples together."""
    first, dmodulation = call.first(), torch.empty_like(call.modulation)
    shared = first.modulation is call.modulation
    dfirst = dmodulation if shared else torch.empty_like(first.modulation)
    dx1, da = _mlp_backward(first, dout, dfirst, kept, grads)
    dx = attention_backward(call, da, dx1, dmodulation, kept, grads)
    if not shared:
        # what nobody wants the result of feels nothing of what follows the attention
        (B, _, D), of_first = call.x.shape, by_sample(dfirst, len(first.x))
        after, of_first = (t[..., 2 * D :] for t in (by_sample(dmodulation, B), of_first))
        after.zero_()
        after[: len(of_first), : of_first.shape[1]] = of_first
    return dx, dmodulation


def _mlp_backward(
    call: LayerCall, dout: Tensor, dmodulation: Tensor, kept: Kept, grads: Gradients
) -> tuple[Tensor, Tensor]:
    """dx1, by sample, and da (n, N, D)."""
    a, m, y, rows = kept.pop("a"), kept.pop("m"), None, call.by_sample
    mod, dmod = call.mod, LayerModulation.of(dmodulation)
    dout, dm = rows(dout), kept.buffer(m)
    gated_residual_backward(dout, rows(m), mod.gate2, dh=rows(dm), dgate=dmod.gate2)
    drop_branch(call, dm, AFTER_MLP)
    if kept["hidden"] is None:
        y, _ = _second_norm(call, a, x1=None)
    w, options = call.weights, call.options
    dy, dhidden = mlp_backward(dm, y, options.mlp, w.fc1, w.fc2, kept, grads)
    del m, dm, y
    da, y = kept.buffer(a), None if dhidden is None else rows(dy)
    dx1 = torch.empty_like(rows(call.x))
    gated_adaln_norm_backward(
        rows(dy), dout, rows(call.x), rows(a), *mod.between, kept.pop("stats2"),
        dx1, rows(da), y, *dmod.between, call.options.norm2.centred,
    )  # fmt: skip
    if dhidden is not None:
        grads.add_weight("fc1", dhidden, dy)  # y is written over dy by now
    return dx1, da


def attention_backward(
    call: LayerCall, da: Tensor, dx1: Tensor, dmodulation: Tensor, kept: Kept, grads: Gradients
) -> Tensor:
    """dx (B, T, D), from da and the rest of x1's gradient."""
    wanted, mod, dmod = call.options.wanted, call.mod, LayerModulation.of(dmodulation)
    qkv = QKV(kept.pop("q"), kept.pop("qkv"))
    if qkv.qkv is None:
        y, _ = first_norm(call, mod.scale1, mod.shift1)
        qkv, kept.owned = QKV.of(y, call.weights.qkv, wanted), True
        del y
    dqkv = attend_backward(call, da, qkv, kept, grads)
    dy = dqkv.backward(call.weights.qkv)
    dy_rows, dx = call.by_sample(dy), torch.empty_like(call.x)
    adaln_norm_backward(
        dy_rows, dx1 if wanted.is_all else None, call.by_sample(call.x), mod.scale1, mod.shift1,
        kept.pop("stats1"), call.by_sample(dx), dy_rows, dmod.scale1, dmod.shift1,
        call.options.norm1.centred,
    )  # fmt: skip
    dqkv.add_to(grads, dy)  # y is written over dy by now
    if not wanted.is_all:
        first = wanted.view(dx)
        first += dx1.view(first.shape)
    return dx


ADALN = Kind("adaln_layer", _write, _at_once)
