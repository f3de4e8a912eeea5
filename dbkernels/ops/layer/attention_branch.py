"""The attention branch of a layer, from its projection to queries, keys and values to its output.

Its backward has three steps, so that a layer may let several streams share the one in the middle:
`output_backward`, the attention's own gradients, and `heads_backward`.
"""

from torch import Tensor

from dbkernels.ops.dropout import drop
from dbkernels.ops.layer.attend import attend_forward, attend_gradients
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.qkv import QKV
from dbkernels.ops.layer.tensors import Kept, LayerCall, like
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

AFTER_ATTENTION, AFTER_MLP = 1, 2  # places of a layer's dropout; a second stream has the next two


def attend_backward(call: LayerCall, da: Tensor, qkv: QKV, kept: Kept, grads: Gradients) -> QKV:
    """dqkv, from the gradient of the branch's output.

    It is written over qkv where that is owned and queries and keys have no norm, whose backward
    reads qkv again. Where the attention was not kept, it is computed again.
    """
    dqkv = gradient_buffer(call, qkv, kept)
    by_head = heads(call, qkv)
    attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
    if attended is None:
        attended, logsumexp = attend_forward(call.options, *by_head)
    dattended = output_backward(call, da, attended, grads)
    dqkv.write(*attend_gradients(call.options, dattended, *by_head, attended, logsumexp))
    heads_backward(call, dqkv, qkv, grads)
    return dqkv


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
