"""What a parallel layer does with samples that run together, forward and backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attend import attend_forward, attend_gradients
from dbkernels.ops.layer.attention_branch import (
    gradient_buffer,
    heads,
    heads_backward,
    output_backward,
)
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import as_rows
from dbkernels.ops.layer.mlp import mlp, mlp_backward
from dbkernels.ops.layer.passes import Kind, Streams, first_norm
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.ranks import sum_or_not
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import Activations, Kept


class Modulation(NamedTuple):
    """(samples, D) each, slices of one tensor."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    @classmethod
    def of(cls, modulation: Tensor) -> "Modulation":
        """Of (..., 3 D)."""
        return cls(*modulation.chunk(3, dim=-1))


def _write(streams: Streams, outs: Sequence[Tensor]) -> list[Activations]:
    (call,), (out,) = streams, outs
    w, options, mod = call.weights, call.options, Modulation.of(call.modulation)
    keeps = POLICIES[options.recompute].keeps
    y, stats = first_norm(call, mod.scale, mod.shift)
    qkv = QKV.of(y, w.qkv, options.wanted)
    hidden = y.new_empty((len(as_rows(y)), w.fc1.width)) if "hidden" in keeps else None
    own = w.fc2.part()
    a = mlp(y, options.mlp, w.fc1, own, hidden=hidden)  # over y, which nothing reads after it
    attended, logsumexp = attend_forward(options, *heads(call, qkv))
    w.out.part().add_of(attended, a)
    if w.ranks is not None:
        w.ranks.sum(a)
        w.out.add_bias(a)
        w.fc2.add_bias(a)
    x, h, y = map(call.by_sample, (call.x, a, out))
    gated_residual_forward(x, h, mod.gate, y=y)
    made = Activations(stats, *qkv, attended, logsumexp, a, hidden=hidden)
    return [made.only(keeps)]


def _gradients(
    streams: Streams,
    douts: Sequence[Tensor],
    all_kept: Sequence[Kept],
    all_grads: Sequence[Gradients],
) -> tuple[list[Tensor], list[Tensor]]:
    """dx (B, T, D) and the gradient of the modulation.

    The MLP goes first: its hidden layer is gone before the attention's widest tensors are there.
    """
    (call,), (dout,), (kept,), (grads,) = streams, douts, all_kept, all_grads
    w, options, rows = call.weights, call.options, call.by_sample
    dmodulation = torch.empty_like(call.modulation)
    mod, dmod = Modulation.of(call.modulation), Modulation.of(dmodulation)
    a = kept.pop("a")
    da = kept.buffer(a)
    gated_residual_backward(rows(dout), rows(a), mod.gate, dh=rows(da), dgate=dmod.gate)
    del a

    qkv, y = QKV(kept.pop("q"), kept.pop("qkv")), None
    if kept["hidden"] is None:
        y, _ = first_norm(call, mod.scale, mod.shift)
    if qkv.qkv is None:
        qkv, kept.owned = QKV.of(y, w.qkv, options.wanted), True
    attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
    if attended is None:
        attended, logsumexp = attend_forward(options, *heads(call, qkv))
    dattended = output_backward(call, da, attended, grads)
    dy, dhidden = mlp_backward(da, y, options.mlp, w.fc1.part(), w.fc2, kept, grads)
    if dhidden is not None:
        # made here and again below, for a pass over x each: kept until then, dhidden would stand
        # beside all of the attention's gradients
        y, _ = first_norm(call, mod.scale, mod.shift)
        grads.add_weight("fc1", dhidden, y)
    del da, y, dhidden

    dqkv = gradient_buffer(call, qkv, kept)
    given = dattended, *heads(call, qkv), attended, logsumexp
    del dattended, attended
    dqkv.write(*attend_gradients(options, *given))
    del given
    heads_backward(call, dqkv, qkv, grads)
    w.qkv.part().add_back(dqkv.qkv, dy)
    sum_or_not(w.ranks, dy)
    dx = torch.empty_like(call.x)
    adaln_norm_backward(
        rows(dy), rows(dout), rows(call.x), mod.scale, mod.shift, kept.pop("stats1"),
        rows(dx), rows(dy), dmod.scale, dmod.shift, options.norm1.centred,
    )  # fmt: skip
    dqkv.add_to(grads, dy)  # y is written over dy by now
    return [dx], [dmodulation]


PARALLEL = Kind("parallel_layer", _write, _gradients)
