"""The attention branch of a layer, from its projection to queries, keys and values to its output.

Several streams may share one attention, whose tokens are those of each in turn.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dbkernels.ops.dropout import drop
from dbkernels.ops.layer.attend import attend_forward, attend_gradients
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.tensors import Kept, LayerCall, like
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

AFTER_ATTENTION, AFTER_MLP = 1, 2  # places of a layer's dropout; a second stream has the next two


def attend(streams: Sequence[LayerCall], qkvs: Sequence[QKV]) -> tuple[Tensor, Tensor]:
    """out (n, N of all streams, H d) and logsumexp."""
    return attend_forward(streams[-1].options, *_heads_of_all(streams, qkvs))


def attend_backward(
    streams: Sequence[LayerCall],
    das: Sequence[Tensor | None],
    qkvs: Sequence[QKV],
    kept: Sequence[Kept],
    grads: Sequence[Gradients],
) -> list[QKV]:
    """dqkv of each stream, from the gradient of the branch's output, None where none is wanted.

    It is written over qkv where that is owned and queries and keys have no norm, whose backward
    reads qkv again. Where the attention was not kept, it is computed again.
    """
    dqkvs = [gradient_buffer(*each) for each in zip(streams, qkvs, kept, strict=True)]
    seen = _heads_of_all(streams, qkvs)
    attended, logsumexp = kept[-1].pop("attended"), kept[-1].pop("logsumexp")
    if attended is None:
        attended, logsumexp = attend_forward(streams[-1].options, *seen)
    dattended = [
        output_backward(call, da, rows, own)
        for call, da, rows, own in zip(streams, das, by_stream(attended, qkvs), grads, strict=True)
        if da is not None
    ]
    dattended = dattended[0] if len(dattended) == 1 else torch.cat(dattended, 1)
    _write(dqkvs, *attend_gradients(streams[-1].options, dattended, *seen, attended, logsumexp))
    for call, dqkv, qkv, own in zip(streams, dqkvs, qkvs, grads, strict=True):
        heads_backward(call, dqkv, qkv, own)
    return dqkvs


def by_stream(attended: Tensor, qkvs: Sequence[QKV]) -> Iterator[Tensor]:
    """(n, N of all streams, H d) -> (n, N, H d) of each, one after another."""
    for rows in attended.split([qkv.queries for qkv in qkvs], dim=1):
        yield rows.contiguous()


def _heads_of_all(streams: Sequence[LayerCall], qkvs: Sequence[QKV]) -> list[Tensor]:
    """Queries, keys and values of all streams as the attention sees them."""
    each = [heads(call, qkv) for call, qkv in zip(streams, qkvs, strict=True)]
    return each[0] if len(each) == 1 else [_one_after_another(t) for t in zip(*each, strict=True)]


def _one_after_another(heads: Sequence[Tensor]) -> Tensor:
    """(n, H, tokens, d) each -> (n, H, all tokens, d), a view of (n, all tokens, H, d)."""
    there = [t.transpose(1, 2) for t in heads if t.shape[2]] or [heads[0].transpose(1, 2)]
    return (there[0] if len(there) == 1 else torch.cat(there, 1)).transpose(1, 2)


def _write(dqkvs: Sequence[QKV], dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The attention's gradients, of all streams, into those of each."""
    queries, tokens = [d.queries for d in dqkvs], [d.qkv.shape[1] for d in dqkvs]
    each = dq.split(queries, dim=2), dk.split(tokens, dim=2), dv.split(tokens, dim=2)
    for dqkv, *own in zip(dqkvs, *each, strict=True):
        dqkv.write(*own)


def heads(call: LayerCall, qkv: QKV) -> list[Tensor]:
    """Queries and keys as the attention sees them, and values, (n or B, H, N or T, d) each."""
    heads, w = call.options.num_heads, call.weights
    q, k, v = qkv.by_head(heads)
    if w.q_weight is None and call.rotary is None:
        return [q, k, v]
    qk = qk_norm_rotary_forward(qkv.whole(), w.qk_norms, call.rotary, heads, call.options.qk_eps)
    seen, k = qk.permute(2, 0, 3, 1, 4)
    return [seen[: len(q), :, : q.shape[2]], k, v]


def output_backward(call: LayerCall, da: Tensor, attended: Tensor, grads: Gradients) -> Tensor:
    """The gradient of what was attended to (n, N, H d), from that of the branch's output."""
    da = drop_branch(call, da, AFTER_ATTENTION)
    grads.add_weight("out", da, attended)
    grads.add_bias("out", da)
    return call.weights.out.back(da)


def gradient_buffer(call: LayerCall, qkv: QKV, kept: Kept) -> QKV:
    """Where the gradient of qkv goes: over it, unless the norms' backward reads it again."""
    return QKV(*(kept.buffer(t) if call.weights.q_weight is None else like(t) for t in qkv))


def heads_backward(call: LayerCall, dqkv: QKV, qkv: QKV, grads: Gradients) -> None:
    """Turn the gradient of what the attention sees, in its place, into that of qkv."""
    w, rotary = call.weights, call.rotary
    if w.q_weight is None and rotary is None:
        return
    whole = dqkv.whole()
    dweights, told = [like(t) for t in w.qk_norms], (call.options.num_heads, call.options.qk_eps)
    qk_norm_rotary_backward(whole, qkv.whole(), *w.qk_norms, rotary, *dweights, *told)
    dqkv.take(whole)
    grads.add("q_weight", dweights[0])
    grads.add("k_weight", dweights[1])


def drop_branch(call: LayerCall, branch: Tensor, place: int) -> Tensor:
    """A branch's output (n, N, D), or its gradient, without what is left out, in its place."""
    dropout = call.options.dropout
    if dropout is None or not dropout.branches:
        return branch
    # by the number of its sample in its stream: what a sample leaves out is then the same in a
    # batch of any size
    for stream, rows in enumerate(branch.tensor_split(call.options.streams_wanted)):
        drop(rows, dropout.branches, dropout.draw, place + 2 * stream, out=rows)
    return branch
