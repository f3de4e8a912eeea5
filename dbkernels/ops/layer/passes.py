"""One call of a layer: its forward, and its backward from whatever the policy kept.

A layer has one residual stream, or several that share one attention; the last one's results are
wanted in any case. `forward` and `backward` share the samples out, for any kind of layer; the rest
is the AdaLN layer, of one stream or more.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attention_branch import (
    AFTER_ATTENTION,
    AFTER_MLP,
    attend,
    attend_backward,
    by_stream,
    drop_branch,
)
from dbkernels.ops.layer.condition import ConditionGradient, ModulationGradient
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import as_rows
from dbkernels.ops.layer.mlp import mlp, mlp_backward
from dbkernels.ops.layer.part import Part
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import Activations, Kept, LayerCall, by_sample, chunks

PART = 4096  # tokens of the samples that run at a time: what they need is little beside the stream
GPU_PART = 8192  # where only q, k, v and hidden are made again, whose peak is no higher for it
Streams = tuple[LayerCall, ...]
FLOAT16_BITS = 15  # 2**15 is a number of float16, 2**16 is none


class Kind(NamedTuple):
    """What one kind of layer does with samples that run together, of each of its streams."""

    name: str
    """Of its op, for errors."""
    write: Callable[[Streams, Sequence[Tensor]], list[Activations]]
    """Its outputs into tensors (n, N, D), and what its policy keeps."""
    gradients: Callable[
        [Streams, Sequence[Tensor], Sequence[Kept], Sequence[Gradients]],
        tuple[list[Tensor], list[Tensor]],
    ]
    """dx and the gradients of the modulations, from dout; kept is emptied as it is used up."""


def forward(kind: Kind, streams: Streams) -> tuple[list[Tensor], list[Activations]]:
    """Each stream's output (n, N, D), and of its activations those that the policy keeps.

    A policy that keeps nothing runs a few samples at a time.
    """
    outs = [call.x.new_empty(call.options.wanted.view(call.x).shape) for call in streams]
    tokens = PART
    if POLICIES[streams[-1].options.recompute].keeps:
        # all samples together, also where they have no tokens
        tokens = max(sum(len(call.x) * call.x.shape[1] for call in streams), len(streams[-1].x))
    for parts, some in _parts(streams, [call.x.dtype for call in streams], tokens):
        results = [call.results(part) for call, part in zip(streams, parts, strict=True)]
        rows = [place.of(out) for place, out in zip(results, outs, strict=True)]
        kept = kind.write(some, rows)
        for place, out, own in zip(results, outs, rows, strict=True):
            place.put_back(out, own)
    return outs, kept


def _parts(
    streams: Streams, dtypes: Sequence[torch.dtype], tokens: int, modulations: Sequence = ()
) -> Iterator[tuple[tuple[Part, ...], Streams]]:
    """Some samples of every stream at a time, of about so many tokens together.

    Args:
        streams:      that share one attention
        dtypes:       of each stream
        tokens:       of a part
        modulations:  what gives those of some samples; none computes them without a gradient
    """
    lengths = [call.options.streams * call.x.shape[1] for call in streams]
    given = zip(streams, dtypes, modulations or [None] * len(streams), lengths, strict=True)
    for some in zip(
        *(
            call.parts(dtype, tokens, modulation and modulation.part, sum(lengths) - length)
            for call, dtype, modulation, length in given
        ),
        strict=True,
    ):
        parts, calls = zip(*some, strict=True)
        yield parts, calls


def backward(
    kind: Kind,
    streams: Streams,
    douts: Sequence[Tensor],
    kept: Sequence[Kept],
    grads: Sequence[Gradients],
    dmodulations: Sequence[ModulationGradient | ConditionGradient],
) -> list[Tensor]:
    """dx (B, T, D) of each stream; gradients of modulations are added where they belong.

    kept is emptied as it is used up. Without q, k and v, which the widest tensors of the
    attention's backward are made from, a few samples run at a time.
    """
    if kept[-1]["qkv"] is not None:
        dxs, dmods = kind.gradients(streams, douts, kept, grads)
        for call, dmod, total in zip(streams, dmods, dmodulations, strict=True):
            total.add(call.all_samples(), dmod)
        return dxs
    dtypes = [dout.dtype for dout in douts]
    dxs = [torch.empty_like(call.x, dtype=t) for call, t in zip(streams, dtypes, strict=True)]
    size = GPU_PART if kept[-1]["a"] is not None and runs_as_on_gpu(douts[-1]) else PART
    for parts, some in _parts(streams, dtypes, size, dmodulations):
        for own in grads:
            own.in_parts(not parts[-1].is_all)
        results = [call.results(part) for call, part in zip(streams, parts, strict=True)]
        own = [_kept_of(*each) for each in zip(kept, parts, results, strict=True)]
        if own[-1]["a"] is None:
            some = tuple(
                call._replace(options=call.options._replace(recompute="none")) for call in some
            )
            own = [Kept(each, owned=True) for each in forward(kind, some)[1]]
        rows = [place.of(dout) for place, dout in zip(results, douts, strict=True)]
        dx_rows, dmods = kind.gradients(some, rows, own, grads)
        for part, dx, own_dx, dmod, total in zip(
            parts, dxs, dx_rows, dmods, dmodulations, strict=True
        ):
            part.put(dx, own_dx)
            total.add(part, dmod)
    for each in kept:
        each.clear()
    return dxs


def _kept_of(kept: Kept, part: Part, results: Part) -> Kept:
    """What some samples left behind."""
    own = Activations(*kept.values()).of(part, results)
    # copies are nobody else's
    return Kept(own, owned=kept.owned or not results.is_together)


def narrowed(call: LayerCall) -> tuple[Tensor, Tensor | None]:
    """x in the dtype of the branches, less what a norm subtracts; x itself if that is no less.

    Around a mean that is large beside the rest, x would lose what the norm makes of it. In float16
    also by what each token was divided, (B, T, 1), a power of two, or 1 where it fits.
    """
    x, norm = call.x, call.options.norm1
    if norm.dtype.itemsize >= x.dtype.itemsize:
        return x, None
    kept, scale = torch.empty_like(x, dtype=norm.dtype), None
    if norm.dtype == torch.float16:
        scale = x.new_empty((*x.shape[:2], 1), dtype=torch.float32)
    B, T, _ = x.shape
    for samples in chunks(B, max(PART // max(T, 1), 1)):
        part = x[samples]
        part = part - part.mean(-1, keepdim=True) if norm.centred else part
        if scale is not None:
            exponent = torch.frexp(part.abs().amax(-1, keepdim=True)).exponent
            scale[samples] = torch.ldexp(scale.new_ones(()), (exponent - FLOAT16_BITS).clamp(min=0))
            part = part / scale[samples]
        kept[samples] = part
    return kept, scale


def subtracted(call: LayerCall) -> Tensor | None:
    """The mean (B, T, 1) that `narrowed` subtracts from x, where something reads x without a norm:
    cross-attention. Else None."""
    x, norm = call.x, call.options.norm1
    if call.context is None or not norm.centred or norm.dtype.itemsize >= x.dtype.itemsize:
        return None
    return x.mean(-1, keepdim=True)


def _write(streams: Streams, outs: Sequence[Tensor]) -> list[Activations]:
    entered = [enter(call) for call in streams]
    qkvs = [qkv for qkv, _ in entered]
    attended, logsumexp = attend(streams, qkvs)
    rows = by_stream(attended, qkvs)
    made = [
        _leave(call, next(rows), out, Activations(stats1, *qkv))
        for call, (qkv, stats1), out in zip(streams, entered, outs, strict=True)
    ]
    made[-1] = made[-1]._replace(attended=attended, logsumexp=logsumexp)
    keeps = POLICIES[streams[-1].options.recompute].keeps
    return [own.only(keeps) for own in made]


def enter(call: LayerCall) -> tuple[QKV, Tensor]:
    """Queries, keys and values of the normalised stream, and the norm's statistics."""
    y, stats1 = first_norm(call, call.mod.scale1, call.mod.shift1)
    return QKV.of(y, call.weights.qkv, call.options.wanted), stats1


def _leave(call: LayerCall, attended: Tensor, out: Tensor, made: Activations) -> Activations:
    """All that follows the attention: writes the layer's output, and adds what else it made."""
    w, options, first = call.weights, call.options, call.first()
    if options.wanted.is_nothing:
        return made
    a = drop_branch(call, w.out.of(attended), AFTER_ATTENTION)
    if call.second is not None:
        made = made._replace(**_attend_alone(call.alone()))
    # nothing else sees x1, so the layer's output takes its place
    x1 = first.by_sample(out)
    y, stats2 = _second_norm(first, a, made.a2, x1=x1)
    keeps_hidden = "hidden" in POLICIES[options.recompute].keeps
    hidden = y.new_empty((len(as_rows(y)), w.fc1.width)) if keeps_hidden else None
    m = drop_branch(call, mlp(y, options.mlp, w.fc1, w.fc2, hidden=hidden), AFTER_MLP)
    gated_residual_forward(x1, first.by_sample(m), first.mod.gate2, y=x1)
    return made._replace(a=a, stats2=stats2, hidden=hidden, m=m)


def _attend_alone(call: LayerCall) -> dict[str, Tensor]:
    """What a second attention leaves behind, by name."""
    qkv, _ = enter(call)
    attended, logsumexp = attend((call,), (qkv,))
    a = call.weights.out.of(attended)
    return {"qkv2": qkv.qkv, "attended2": attended, "logsumexp2": logsumexp, "a2": a}


def first_norm(call: LayerCall, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """y1 (B, T, D) and its statistics."""
    y, stats = adaln_norm_forward(call.options.norm1, call.by_sample(call.x), scale, shift)
    return y.view(call.x.shape), stats


def _second_norm(
    call: LayerCall, a: Tensor, a2: Tensor | None, *, x1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y2 (B, T, D) and its statistics; writes x1 where it is given."""
    x, h = _last_sum(call, a, a2, x1)
    y, stats = gated_adaln_norm_forward(call.options.norm2, x, h, *call.mod.between, x1)
    return y.view(call.x.shape), stats


def _last_sum(
    call: LayerCall, a: Tensor, a2: Tensor | None, buffer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By sample, the stream before the last branch is added ahead of the MLP, and that branch."""
    x, h = map(call.by_sample, (call.x, a))
    if a2 is None:
        return x, h
    y = torch.empty_like(x) if buffer is None else buffer
    gated_residual_forward(x, h, call.mod.gate1, y=y)
    return y, call.by_sample(a2)


def _at_once(
    streams: Streams, douts: Sequence[Tensor], kept: Sequence[Kept], grads: Sequence[Gradients]
) -> tuple[list[Tensor], list[Tensor]]:
    """dx and the modulation's gradient of each stream, of all samples together."""
    dmods = [torch.empty_like(call.modulation) for call in streams]
    each = list(zip(streams, dmods, kept, grads, strict=True))
    left = [_leave_backward(*own, dout) for own, dout in zip(each, douts, strict=True)]
    qkvs = [qkv_of(call, own) for call, own in zip(streams, kept, strict=True)]
    das = [da for _, da in left]
    dqkvs = attend_backward(streams, das, qkvs, kept, grads)
    dxs = [
        enter_backward(call, dqkv, dx1, own.pop("stats1"), dmod, gradients)
        for (call, dmod, own, gradients), dqkv, (dx1, _) in zip(each, dqkvs, left, strict=True)
    ]
    return dxs, dmods


def _leave_backward(
    call: LayerCall, dmodulation: Tensor, kept: Kept, grads: Gradients, dout: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`_mlp_backward` of what is wanted; None where nothing is."""
    if call.options.wanted.is_nothing:
        return None, None
    first, shared = call.first(), True
    if first.modulation is not call.modulation:
        shared, whole, dmodulation = False, dmodulation, torch.empty_like(first.modulation)
    dx1, da = _mlp_backward(first, dout, dmodulation, kept, grads)
    if not shared:
        # what nobody wants the result of feels nothing of what follows the attention
        (B, _, D), of_first = call.x.shape, by_sample(dmodulation, len(first.x))
        after, of_first = (t[..., 2 * D :] for t in (by_sample(whole, B), of_first))
        after.zero_()
        after[: len(of_first), : of_first.shape[1]] = of_first
    return dx1, da


def _mlp_backward(
    call: LayerCall, dout: Tensor, dmodulation: Tensor, kept: Kept, grads: Gradients
) -> tuple[Tensor, Tensor]:
    """dx1 (n, N, D) or by sample, the gradient beside the attention's, and da (n, N, D)."""
    a, a2, m, y, rows = kept.pop("a"), kept.pop("a2"), kept.pop("m"), None, call.by_sample
    mod, dmod = call.mod, call.options.layout.of(dmodulation)
    dout, dm = rows(dout), kept.buffer(m)
    gated_residual_backward(dout, rows(m), mod.gate2, dh=rows(dm), dgate=dmod.gate2)
    drop_branch(call, dm, AFTER_MLP)
    if kept["hidden"] is None:
        y, _ = _second_norm(call, a, a2, x1=None)
    w, options = call.weights, call.options
    dy, dhidden = mlp_backward(dm, y, options.mlp, w.fc1, w.fc2, kept, grads)
    del m, dm, y
    x, h = _last_sum(call, a, a2)
    dh, y = kept.buffer(a if a2 is None else a2), None if dhidden is None else rows(dy)
    dx1 = torch.empty_like(rows(call.x))
    gated_adaln_norm_backward(
        rows(dy), dout, x, h, *mod.between, kept.pop("stats2"),
        dx1, rows(dh), y, *dmod.between, options.norm2.centred,
    )  # fmt: skip
    if dhidden is not None:
        grads.add_weight("fc1", dhidden, dy)  # y is written over dy by now
    if a2 is None:
        return dx1, dh
    del x, h, dy, y, dhidden
    da = kept.buffer(a)
    gated_residual_backward(dx1, rows(a), mod.gate1, dh=rows(da), dgate=dmod.gate1)
    return _second_backward(call, dh, dx1, dmodulation, kept, grads), da


def _second_backward(
    call: LayerCall, da2: Tensor, dx1: Tensor, dmodulation: Tensor, kept: Kept, grads: Gradients
) -> Tensor:
    """dx1 with what goes by the second attention."""
    alone, own = call.alone(), kept.take_second()
    qkv = qkv_of(alone, own)
    (dqkv,) = attend_backward((alone,), (da2,), (qkv,), (own,), (grads.second,))
    return enter_backward(alone, dqkv, dx1, kept["stats1"], dmodulation, grads.second)


def qkv_of(call: LayerCall, kept: Kept) -> QKV:
    """What was kept, or made again."""
    qkv = QKV(kept.pop("q"), kept.pop("qkv"))
    if qkv.qkv is None:
        qkv, kept.owned = enter(call)[0], True
    return qkv


def enter_backward(
    call: LayerCall,
    dqkv: QKV,
    dx1: Tensor | None,
    stats1: Tensor,
    dmodulation: Tensor,
    grads: Gradients,
) -> Tensor:
    """dx (B, T, D)."""
    wanted, mod, dmod = call.options.wanted, call.mod, call.options.layout.of(dmodulation)
    dy = dqkv.backward(call.weights.qkv)
    dy_rows, dx = call.by_sample(dy), torch.empty_like(call.x)
    adaln_norm_backward(
        dy_rows, call.by_sample(dx1) if wanted.is_all else None, call.by_sample(call.x),
        mod.scale1, mod.shift1, stats1, call.by_sample(dx), dy_rows, dmod.scale1, dmod.shift1,
        call.options.norm1.centred,
    )  # fmt: skip
    dqkv.add_to(grads, dy)  # y is written over dy by now
    if dx1 is not None and not wanted.is_all:
        first = wanted.view(dx)
        first += dx1.view(first.shape)
    return dx


ADALN, JOINT = (Kind(name, _write, _at_once) for name in ("adaln_layer", "joint_layer"))
