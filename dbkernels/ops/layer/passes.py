"""One call of an AdaLN layer: its forward, and its backward from whatever the policy kept.

The MLP runs in chunks of tokens: its widest tensors exist a part at a time.
"""

import torch
from torch import Tensor

from dbkernels.ops.activations import BACKWARD_OPS, activation_forward
from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.dropout import drop
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attend import attend_forward, attend_gradients
from dbkernels.ops.layer.condition import ConditionGradient, ModulationGradient
from dbkernels.ops.layer.projection import QKV, Gradients, as_rows, project
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import (
    Activations,
    Kept,
    LayerCall,
    LayerModulation,
    LayerWeights,
    by_sample,
    chunks,
    like,
)
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary_backward, qk_norm_rotary_forward

PART = 4096  # tokens of the samples that run at a time: what they need is little beside the stream
GPU_PART = 8192  # where only q, k, v and hidden are made again, whose peak is no higher for it
AFTER_ATTENTION, AFTER_MLP = 1, 2  # places of a layer's dropout; a second stream has the next two
FLOAT16_BITS = 15  # 2**15 is a number of float16, 2**16 is none
CHUNK = 8192  # tokens: enough of them to fill a GPU with one matmul
_addmm_gelu = torch.ops.aten._addmm_activation


def forward(call: LayerCall) -> tuple[Tensor, Activations]:
    """The layer's output (n, N, D), and of its activations those that the policy keeps.

    A policy that keeps nothing runs a few samples at a time.
    """
    B, T, _ = call.x.shape
    out = call.x.new_empty(call.options.wanted.view(call.x).shape)
    tokens = B * T if POLICIES[call.options.recompute].keeps else PART
    for part, some in call.parts(call.x.dtype, tokens):
        results = call.results(part)
        rows = results.of(out)
        kept = _write(some, rows)
        results.put_back(out, rows)
    return out, kept


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


def _write(call: LayerCall, out: Tensor) -> Activations:
    w, options, first = call.weights, call.options, call.first()
    keeps = POLICIES[options.recompute].keeps
    y, stats1 = _first_norm(call)
    qkv = QKV.of(y, w, options.wanted)
    attended, logsumexp = attend_forward(options, *_by_head(call, qkv))
    a = _drop_branch(call, project(attended, w.out_weight, w.out_bias), AFTER_ATTENTION)

    # nothing else sees x1, so the layer's output takes its place
    x1 = first.by_sample(out)
    y, stats2 = _second_norm(first, a, x1=x1)
    hidden = y.new_empty((len(as_rows(y)), len(w.fc1_weight))) if "hidden" in keeps else None
    m = _drop_branch(call, mlp(y, options.mlp, w, hidden=hidden), AFTER_MLP)
    gated_residual_forward(x1, first.by_sample(m), first.mod.gate2, y=x1)
    made = Activations(stats1, *qkv, attended, logsumexp, a, stats2, hidden, m)
    return Activations(*(t if name in keeps else None for name, t in made._asdict().items()))


def _first_norm(call: LayerCall) -> tuple[Tensor, Tensor]:
    """y1 (B, T, D) and its statistics."""
    mod, x = call.mod, call.by_sample(call.x)
    y, stats = adaln_norm_forward(call.options.norm1, x, mod.scale1, mod.shift1)
    return y.view(call.x.shape), stats


def _second_norm(call: LayerCall, a: Tensor, *, x1: Tensor | None) -> tuple[Tensor, Tensor]:
    """y2 (B, T, D) and its statistics; writes x1 where it is given."""
    x, h = map(call.by_sample, (call.x, a))
    y, stats = gated_adaln_norm_forward(call.options.norm2, x, h, *call.mod.between, x1)
    return y.view(call.x.shape), stats


def backward(
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
        dx, dmod = _at_once(call, dout, kept, grads)
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
            own = Kept(forward(some)[1], owned=True)
        dx_rows, dmod = _at_once(some, results.of(dout), own, grads)
        part.put(dx, dx_rows)
        dmodulation.add(part, dmod)
    kept.clear()
    return dx


def _at_once(call: LayerCall, dout: Tensor, kept: Kept, grads: Gradients) -> tuple[Tensor, Tensor]:
    """`backward`, of all samples together."""
    first, dmodulation = call.first(), torch.empty_like(call.modulation)
    shared = first.modulation is call.modulation
    dfirst = dmodulation if shared else torch.empty_like(first.modulation)
    dx1, da = _mlp_backward(first, dout, dfirst, kept, grads)
    dx = _attention_backward(call, da, dx1, dmodulation, kept, grads)
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
    _drop_branch(call, dm, AFTER_MLP)
    if kept["hidden"] is None:
        y, _ = _second_norm(call, a, x1=None)
    dy, dhidden = mlp_backward(call, dm, y, kept, grads)
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


def _attention_backward(
    call: LayerCall, da: Tensor, dx1: Tensor, dmodulation: Tensor, kept: Kept, grads: Gradients
) -> Tensor:
    """dx (B, T, D)."""
    wanted, mod, dmod = call.options.wanted, call.mod, LayerModulation.of(dmodulation)
    qkv = QKV(kept.pop("q"), kept.pop("qkv"))
    if qkv.qkv is None:
        qkv, kept.owned = QKV.of(_first_norm(call)[0], call.weights, wanted), True
    dqkv = attend_backward(call, da, qkv, kept, grads)
    dy = dqkv.backward(call.weights)
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


# the branches: attention after its projection to q, k and v, and the MLP


def attend_backward(call: LayerCall, da: Tensor, qkv: QKV, kept: Kept, grads: Gradients) -> QKV:
    """dqkv, from the gradient of the branch's output.

    It is written over qkv where that is owned and queries and keys have no norm, whose backward
    reads qkv again. Where the attention was not kept, it is computed again.
    """
    w, rotary = call.weights, call.rotary
    da = _drop_branch(call, da, AFTER_ATTENTION)
    dqkv = QKV(*(kept.buffer(t) if w.q_weight is None else like(t) for t in qkv))
    by_head = _by_head(call, qkv)
    attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
    if attended is None:
        attended, logsumexp = attend_forward(call.options, *by_head)
    grads.add_weight("out", da, attended)
    grads.add_bias("out", da)
    dattended = project(da, w.out_weight.T)
    dqkv.write(*attend_gradients(call.options, dattended, *by_head, attended, logsumexp))
    if w.q_weight is None and rotary is None:
        return dqkv
    whole = dqkv.whole()
    dweights, told = [like(t) for t in w.qk_norms], (call.options.num_heads, call.options.qk_eps)
    qk_norm_rotary_backward(whole, qkv.whole(), *w.qk_norms, rotary, *dweights, *told)
    dqkv.take(whole)
    grads.add("q_weight", dweights[0])
    grads.add("k_weight", dweights[1])
    return dqkv


def _by_head(call: LayerCall, qkv: QKV) -> list[Tensor]:
    """Queries and keys as the attention sees them, and values, (n or B, H, N or T, d) each."""
    heads, w = call.options.num_heads, call.weights
    q, k, v = qkv.by_head(heads)
    if w.q_weight is None and call.rotary is None:
        return [q, k, v]
    qk = qk_norm_rotary_forward(qkv.whole(), w.qk_norms, call.rotary, heads, call.options.qk_eps)
    seen, k = qk.permute(2, 0, 3, 1, 4)
    return [seen[: len(q), :, : q.shape[2]], k, v]


def _drop_branch(call: LayerCall, branch: Tensor, place: int) -> Tensor:
    """A branch's output (n, N, D), or its gradient, without what is left out, in its place."""
    dropout = call.options.dropout
    if dropout is None or not dropout.branches:
        return branch
    # by the number of its sample in its stream: what a sample leaves out is then the same in a
    # batch of any size
    for stream, rows in enumerate(branch.tensor_split(call.options.streams_wanted)):
        drop(rows, dropout.branches, dropout.draw, place + 2 * stream, out=rows)
    return branch


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
