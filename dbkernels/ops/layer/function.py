"""A whole layer as one autograd function, with a chosen set of what it keeps; the AdaLN layer's:

    y1 = (1 + scale1) * norm(x) + shift1,     a = attention(y1),    x1 = x + gate1 * a
    y2 = (1 + scale2) * norm(x1) + shift2,    m = mlp(y2),          out = x1 + gate2 * m

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. Of all that this makes, the backward
needs only x, q, k, v, the attention's result, a, the MLP's pre-activation and m: the rest are
elementwise functions of those within a row. `recompute` tells what less can be kept.

Where a sequence's first tokens alone are read, or the noisy stream of two, the others are only keys
and values: of them x, k and v are all that is computed and kept.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.attention import check_head_width
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, is_last_to_read
from dbkernels.ops.cross_attention import check_lengths
from dbkernels.ops.dropout import Dropout, check_share
from dbkernels.ops.layer import passes, tensors
from dbkernels.ops.layer.attend import check_attention, wanted_of
from dbkernels.ops.layer.condition import (
    Condition,
    ConditionGradient,
    ModulationGradient,
    autocast_again,
    rows_of_modulation,
)
from dbkernels.ops.layer.flat import Form, flatten
from dbkernels.ops.layer.modulation import LayerModulation
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.shapes import check_weights
from dbkernels.ops.layer.tensors import (
    AttentionKind,
    Context,
    LayerCall,
    LayerOptions,
    ResidualStream,
    Turn,
)
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice

KEPT = len(tensors.Activations._fields)
FIRST = 6  # place of the weights among what the function is given

# autograd


class _Told(NamedTuple):
    """What is neither a tensor with a gradient nor of a call."""

    kind: passes.Kind
    options: LayerOptions
    modulate: Callable[..., Tensor] | None
    """Of a condition, where the modulation is computed again from it."""
    parameters: int
    """Of the condition's modulation; they follow the weights."""
    turn: Turn
    """Of the call in its run."""
    form: Form
    """Of the weights."""


class _Layer(torch.autograd.Function):
    """(out, a, m), the last two None if they are not kept.

    The modulation is that, or the condition from which it is made. After the weights come the
    parameters that make it, and the run that led to x.
    """

    @staticmethod
    def forward(ctx, told, x, modulation, rotary, context, lengths, *rest):
        options, count = told.options, len(told.form)
        weights, parameters = rest[:count], rest[count : count + told.parameters]
        run = rest[count + told.parameters :]
        w = told.form.whole(weights, options.norm1.dtype)
        made_of = _made_of(told, modulation, parameters)
        other = None if context is None else Context(context, lengths)
        call = LayerCall(x, made_of, rotary, w, options, context=other)
        (out,), (kept,) = passes.forward(told.kind, (call,))
        scale, mean = None, None
        if POLICIES[options.recompute].narrow:
            (*run, scale), mean = passes.narrowed(call), passes.subtracted(call)
        given = modulation, rotary, context, lengths
        ctx.save_for_backward(*given, *weights, *parameters, *kept, scale, mean, *run)
        ctx.mark_non_differentiable(*(branch for branch in (kept.a, kept.m) if branch is not None))
        ctx.set_materialize_grads(False)
        ctx.told = told
        ctx.autocast = None if told.modulate is None else autocast_again(x.device)
        return out, kept.a, kept.m

    @staticmethod
    def backward(ctx, dout, da, dm):
        kind, options, modulate, count, turn, form = ctx.told
        checks.refuse_double_backward(kind.name)
        needed = ctx.needs_input_grad
        if dout is None:
            return (None,) * len(needed)
        last = is_last_to_read()
        # a layer after this one may be differentiated later than this, for a loss between layers
        owned = last and not turn.is_read()
        modulation, rotary, context, lengths, *saved = ctx.saved_tensors
        weights, saved = saved[: len(form)], saved[len(form) :]
        parameters, saved = saved[:count], saved[count:]
        kept = tensors.Kept(tensors.Activations(*saved[:KEPT]), owned=owned)
        scale, mean, start, *sums = saved[KEPT:]
        if last:
            # nothing but kept holds what the forward kept, so each tensor dies with its last use
            ctx.maybe_clear_saved_tensors()
        del saved
        x = tensors.end_of_run(start, sums)
        # kept from the forward, the casts would take 2 bytes for each parameter of a block at the
        # peak of its step: to read 4 bytes and write 2 again costs far less than that memory
        w = form.whole(weights, options.norm1.dtype)
        end = FIRST + len(form)
        gradients = form.gradients(needed[FIRST:end], weights, w)
        made_of = _made_of(ctx.told, modulation, parameters)
        dcontext = torch.empty_like(context) if needed[4] else None
        other = None if context is None else Context(context, lengths, dcontext)
        call = LayerCall(x, made_of, rotary, w, options, scale, mean=mean, context=other)
        if modulate is None:
            dmodulation = ModulationGradient(modulation)
        else:
            wanted = needed[2], *needed[end : end + count]
            dmodulation = ConditionGradient(made_of, wanted, ctx.autocast)
        with dtypes_as_they_are(dout.device.type):
            given = (dout.contiguous(),), (kept,), (gradients,), (dmodulation,)
            (dx,) = passes.backward(kind, (call,), *given)
        dweights = form.apart(gradients, weights)
        if last:
            turn.is_done = True
        dmodulation, *dparameters = dmodulation.results()
        grads = None, dx, dmodulation, None, dcontext, None, *dweights, *dparameters
        return *grads, *(None,) * (len(needed) - len(grads))


def _made_of(told: _Told, modulation: Tensor, parameters: Sequence[Tensor]) -> Tensor | Condition:
    if told.modulate is None:
        return modulation
    return Condition(modulation, told.modulate, tuple(parameters))


# public


def adaln_layer(
    x: Tensor,
    modulation: Tensor | Condition,
    weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    eps2: float | None = None,
    qk_eps: float = 1e-6,
    recompute: Recompute = "none",
    stream: ResidualStream | None = None,
    num_queries: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    draw: Draw | None = None,
    attention: AttentionKind = "full",
    num_samples: int | None = None,
) -> Tensor:
    """Run one AdaLN layer, keeping for its backward what the policy says.

    The branches run in the dtype of the weights, or in autocast's; the residual stream keeps that
    of x. The backward writes over what it kept, unless it is told to retain the graph.

    Args:
        x:           (B, T, D)  residual stream: float32, bfloat16 or float16
        modulation:  (B, 6 D) per sample or (B, T, 6 D) per token: shift, scale and gate of the
                     attention branch, then of the MLP; or the condition of each token that it is
                     made of, which policies that keep little keep in its place
        weights:     of one dtype, as `LayerWeights` tells their shapes; any may be `Stacked`. Its
                     adapters may have other dtypes, and run in that of the branches. With `ranks`
                     they are this rank's part of the layer, without adapters or `Stacked`
        num_heads:   H, of this rank where there are ranks, and then head_dim is given
        head_dim:    d; None is D / H, and then H divides D
        rotary:      (2, T, d) cosines and sines, float32; None does not rotate
        mlp:         "gelu" (tanh), "gelu_exact" or "swiglu"
        norm:        "layer", or "rms", which does not subtract the mean
        eps:         of the norms, in units of x**2
        eps2:        of the norm before the MLP; None is eps
        qk_eps:      of the norms of queries and keys, in units of their squares
        recompute:   a name of `POLICIES`
        stream:      of the stack that this layer stands in: spares most layers keeping x
        num_queries: 1 to T: the first so many tokens' results alone, for which all T are keys and
                     values; None is T. What only others need is neither computed nor kept. Of full
                     attention alone
        dropout:     share of each branch's output that is left out, in [0, 1)
        attention_dropout: share of the attention's weights that is left out; the attention is then
                     plain torch, a few samples at a time
        draw:        names what is left out, for `dropout` by its places 0 to 2; nothing of it is
                     kept. None only without dropout. A clean stream has places 3 and 4, and its
                     samples the numbers of the noisy ones
        attention:   "full"; "causal", of which a token sees itself and those before; or
                     "two_stream", that of `two_stream_attention`: x then holds the noisy stream's
                     samples and after them as many of the clean one
        num_samples: of two streams as many as one has: the noisy one's results alone, of which the
                     clean one is keys and values; None is all. What else it needs is neither
                     computed nor kept
    Returns:
        (B or num_samples, T or num_queries, D), dtype of x.
    Raises:
        ValueError: a shape, dtype or device disagrees, a name is unknown, num_queries is not from
            1 to T, num_samples is not that of a stream, either or attention_dropout is not for this
            attention, dropout is not in [0, 1) or has no draw, or a layer on several ranks has
            adapters, `Stacked` weights or attention_dropout, or is compiled.
        RuntimeError: the gradient is differentiated.
    """
    check_choice("mlp", mlp, ACTIVATIONS)
    modulation = modulation_at(recompute, modulation)
    dtype, centred = compute_dtype(x, weights.qkv_weight), checks.check_norm(norm)
    norms = (NormOptions(each, centred, dtype) for each in (eps, eps if eps2 is None else eps2))
    dropped = _dropout(dropout, attention_dropout, draw)
    if attention_dropout and weights.ranks is not None:
        raise ValueError(f"attention_dropout must be 0 with ranks, got {attention_dropout}")
    checks.check_tokens(x=x)
    check_attention(attention, attention_dropout, x.shape[0])
    wanted = wanted_of(x, attention, num_queries, num_samples)
    options = LayerOptions(
        num_heads, mlp, *norms, qk_eps, recompute, wanted, dropped, attention
    )  # fmt: skip
    call = LayerCall(x, modulation, rotary, weights, options)
    check_call(call, head_dim, chunks=6)
    return apply_layer(passes.ADALN, call, stream)


def modulation_at(recompute: Recompute, modulation: Tensor | Condition) -> Tensor | Condition:
    """The modulation, or its condition where the policy keeps that in its place."""
    check_choice("recompute", recompute, POLICIES)
    keeps = POLICIES[recompute].keeps_modulation or torch.compiler.is_compiling()
    if isinstance(modulation, Condition) and keeps:
        return modulation.modulation()
    return modulation


def apply_layer(kind: passes.Kind, call: LayerCall, stream: ResidualStream | None = None) -> Tensor:
    """The output (n, N, D) of a call whose tensors are checked, with its gradient."""
    (x, modulation, rotary, weights, options, *_), modulate, parameters = call, None, ()
    x, (context, lengths, _) = x.contiguous(), call.context or Context(None, None)
    if isinstance(modulation, Condition):
        modulation, modulate, parameters = modulation
        stream = None  # whose runs hold the gates of earlier layers
    else:
        modulation = rows_of_modulation(modulation)
    run, turn = ((x.detach(),), Turn()) if stream is None else stream.run_to(x)
    flat, form = flatten(weights)
    told = _Told(kind, options, modulate, len(parameters), turn, form)
    out, a, m = _Layer.apply(
        told, x, modulation, rotary, context, lengths, *flat, *parameters, *run
    )
    if stream is not None and options.wanted.is_all and out.requires_grad and a is not None:
        mod = LayerModulation.of(modulation)
        stream.extend(run, turn, out, mod.gate1, a, mod.gate2, m)
    return out


def _dropout(branches: float, attention: float, draw: Draw | None) -> Dropout | None:
    check_share("dropout", branches)
    check_share("attention_dropout", attention)
    if not branches and not attention:
        return None
    if draw is None:
        raise ValueError(f"draw must be given with dropout {branches} and {attention}, got None")
    return Dropout(branches, attention, draw)


def check_call(call: LayerCall, d: int | None, *, chunks: int) -> None:
    """Shapes, dtypes and devices of one call, whose modulation has so many chunks of D."""
    (x, modulation, rotary, w, options, *_), context = call, call.context
    of_tokens = isinstance(modulation, Condition)
    given = {"c": modulation.c} if of_tokens else {"modulation": modulation}
    given |= {} if context is None else {"context": context.tokens}
    tensors = dict(zip(w.names(), w.tensors(), strict=True))
    checks.check_floats(x=x, **given, rotary=rotary, **tensors)
    B, T, D = x.shape
    if context is not None:
        _check_context(context, B)
    if of_tokens and (modulation.c.dim() != 3 or tuple(modulation.c.shape[:2]) != (B, T)):
        got = tuple(modulation.c.shape)
        raise ValueError(f"a condition's c must be (B, T, C) = ({B}, {T}, C), got {got}")
    width = chunks * D
    if not of_tokens and tuple(modulation.shape) not in ((B, width), (B, T, width)):
        raise ValueError(
            f"modulation must be (B, {chunks} D) = ({B}, {width}) or (B, T, {chunks} D) = "
            f"({B}, {T}, {width}), got {tuple(modulation.shape)}"
        )
    H = options.num_heads
    if H < 1 or (d is None and D % H):
        raise ValueError(f"num_heads must divide D = {D}, got {H}")
    d = D // H if d is None else d
    if d < 1:
        raise ValueError(f"head_dim must be at least 1, got {d}")
    check_head_width(x.device, d)
    checks.check_heads(*w.qk_norms, rotary, T, d)
    C = None if context is None else context.tokens.shape[-1]
    check_weights("", w, D, H * d, d, mlp=options.mlp, C=C)


def _check_context(context: Context, B: int) -> None:
    tokens, lengths, _ = context
    if tokens.dim() != 3 or len(tokens) != B:
        raise ValueError(f"context must be (B, S, C) = ({B}, S, C), got {tuple(tokens.shape)}")
    check_lengths(lengths, tokens)
