"""The two branches of a layer: attention after its projection to q, k and v, and the MLP.

The MLP runs in chunks of tokens: its widest tensors exist a part at a time.
"""

import torch
from torch import Tensor

from dbkernels.ops.activations import BACKWARD_OPS, activation_forward
from dbkernels.ops.attention import attention_backward, attention_forward
from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.layer.projection import QKV, Gradients, as_rows, project
from dbkernels.ops.layer.tensors import Kept, LayerCall, LayerWeights, chunks, like
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

QK_EPS = 1e-6  # of the norms of queries and keys
CHUNK = 8192  # tokens: enough of them to fill a GPU with one matmul
_addmm_gelu = torch.ops.aten._addmm_activation


def attend(call: LayerCall, qkv: QKV) -> tuple[Tensor, Tensor]:
    """The attention's result (B, N, D) and its logsumexp, for N queries of each sample."""
    return attention_forward(*_by_head(call, qkv))


def attend_backward(call: LayerCall, da: Tensor, qkv: QKV, kept: Kept, grads: Gradients) -> QKV:
    """dqkv, from the gradient of the branch's output.

    It is written over qkv where that is owned and queries and keys have no norm, whose backward
    reads qkv again. Where the attention was not kept, it is computed again.
    """
    w, rotary = call.weights, call.rotary
    dqkv = QKV(*(kept.buffer(t) if w.q_weight is None else like(t) for t in qkv))
    by_head = _by_head(call, qkv)
    attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
    if attended is None:
        attended, logsumexp = attention_forward(*by_head)
    grads.add_projection("out", da, attended)
    dattended = project(da, w.out_weight.T)
    dqkv.write(*attention_backward(dattended, *by_head, attended, logsumexp))
    if w.q_weight is None and rotary is None:
        return dqkv
    whole = dqkv.whole()
    dweights, heads = [like(t) for t in w.qk_norms], call.options.num_heads
    qk_norm_rotary_backward(whole, qkv.whole(), *w.qk_norms, rotary, *dweights, heads, QK_EPS)
    dqkv.take(whole)
    grads.add("q_weight", dweights[0])
    grads.add("k_weight", dweights[1])
    return dqkv


def _by_head(call: LayerCall, qkv: QKV) -> list[Tensor]:
    """Queries and keys as the attention sees them, and values, (B, H, N or T, D / H) each."""
    heads, w = call.options.num_heads, call.weights
    q, k, v = qkv.by_head(heads)
    if w.q_weight is None and call.rotary is None:
        return [q, k, v]
    qk = qk_norm_rotary_forward(qkv.whole(), w.qk_norms, call.rotary, heads, QK_EPS)
    seen, k = qk.permute(2, 0, 3, 1, 4)
    return [seen[:, :, : q.shape[2]], k, v]


def mlp(y: Tensor, mlp: str, w: LayerWeights, *, hidden: Tensor | None) -> Tensor:
    """The MLP's output, over y (B, T, D); writes hidden (B * T, F) where it is given."""
    rows = as_rows(y)
    epilogue = hidden is None and _has_epilogue(rows, mlp, w)
    for chunk in chunks(len(rows), _chunk(rows, 2 if hidden is None and not epilogue else 1)):
        if epilogue:
            u = _addmm_gelu(w.fc1_bias, rows[chunk], w.fc1_weight.T, use_gelu=True)
        else:
            kept = None if hidden is None else hidden[chunk]
            u = activation_forward(mlp, project(rows[chunk], w.fc1_weight, out=kept), w.fc1_bias)
        project(u, w.fc2_weight, w.fc2_bias, out=rows[chunk])
        del u  # or the next chunk's would stand beside it
    return y


def mlp_backward(
    call: LayerCall, dm: Tensor, y: Tensor | None, kept: Kept, grads: Gradients
) -> tuple[Tensor, Tensor | None]:
    """dy (B, T, D), from the gradient of the MLP's output, and the gradient of hidden.

    Where hidden was kept, its gradient is written over it if it is owned, and the gradient of fc1's
    weight is left to the caller, who has y later. Else hidden is computed again from y, and has
    none. dy is written over dm, a chunk at a time.
    """
    w, rows, hidden = call.weights, as_rows(dm), kept.pop("hidden")
    dhidden, size = kept.buffer(hidden), _chunk(rows, 2 if hidden is None else 1)
    part = len(rows) > size
    grads.add_bias("fc2", dm)
    for chunk in chunks(len(rows), size):
        h = project(as_rows(y)[chunk], w.fc1_weight) if hidden is None else hidden[chunk]
        dh = h if hidden is None else dhidden[chunk]
        u = project(rows[chunk], w.fc2_weight.T)  # du, until the activation is written over it
        dbias = h.new_empty(h.shape[1], dtype=statistics_dtype(h))
        BACKWARD_OPS[call.options.mlp](h, u, w.fc1_bias, dh, u, dbias)
        grads.add_weight("fc2", rows[chunk], u, part=part)
        grads.add("fc1_bias", dbias)
        if hidden is None:
            grads.add_weight("fc1", dh, as_rows(y)[chunk], part=part)
        project(dh, w.fc1_weight.T, out=rows[chunk])
        del h, dh, u, dbias
    return dm, dhidden


def _has_epilogue(rows: Tensor, mlp: str, w: LayerWeights) -> bool:
    """Whether fc1 can give its activation alone, for those who do not keep its pre-activation.

    cuBLASLt adds the bias and takes GELU in its tanh form before it rounds and writes: one launch
    less, and 4 F bytes less to move for a token. Only for bfloat16: the tanh may be the hardware's,
    of 11 bits. A CPU's op of that name has GELU's other form.
    """
    fits = mlp == "gelu" and w.fc1_bias is not None and rows.dtype == torch.bfloat16
    return fits and runs_as_on_gpu(rows)


def _chunk(rows: Tensor, temporaries: int) -> int:
    """Tokens of a chunk, of those in rows, each of which has so many temporaries of hidden's width.

    On a GPU those of a chunk together are as large as hidden would be of half of the tokens, which
    the attention's backward needs too, or of 2 CHUNK: few launches are worth more than that saves.
    """
    if not runs_as_on_gpu(rows):
        return CHUNK
    return max(2 * CHUNK, -(-len(rows) // 2)) // temporaries
