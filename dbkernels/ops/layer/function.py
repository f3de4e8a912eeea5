"""A whole AdaLN layer as one autograd function, with a chosen set of what it keeps.

    y1 = (1 + scale1) * norm(x) + shift1,     a = attention(y1),    x1 = x + gate1 * a
    y2 = (1 + scale2) * norm(x1) + shift2,    m = mlp(y2),          out = x1 + gate2 * m

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. Of all that this makes, the backward
needs only x, q, k, v, the attention's result, a, the MLP's pre-activation and m: the rest are
elementwise functions of those within a row. `recompute` tells what less can be kept.

Where a sequence's first tokens alone are read, the others are only keys and values: of them x, k
and v are all that is computed and kept.
"""

import torch
from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.attention import check_head_width
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, is_last_to_read
from dbkernels.ops.layer import passes, tensors
from dbkernels.ops.layer.projection import Gradients, cast
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.tensors import LayerCall, LayerOptions, LayerWeights, ResidualStream, Turn
from dbkernels.settings import check_choice

WEIGHTS, KEPT = len(LayerWeights._fields), len(tensors.Activations._fields)

# autograd


class _AdaLNLayer(torch.autograd.Function):
    """(out, a, m), the last two None if nothing is kept.

    The run that led to x follows the weights.
    """

    @staticmethod
    def forward(ctx, options, turn, x, modulation, rotary, *rest):
        weights, run = rest[:WEIGHTS], rest[WEIGHTS:]
        w = LayerWeights(*cast(weights, options.norm.dtype))
        call = LayerCall(x, modulation, rotary, w, options)
        out, kept = passes.forward(call)
        if POLICIES[options.recompute].narrow:
            run = (passes.narrowed(call),)
        ctx.save_for_backward(modulation, rotary, *weights, *kept, *run)
        ctx.mark_non_differentiable(*(branch for branch in (kept.a, kept.m) if branch is not None))
        ctx.set_materialize_grads(False)
        ctx.options, ctx.turn = options, turn
        return out, kept.a, kept.m

    @staticmethod
    def backward(ctx, dout, da, dm):
        checks.refuse_double_backward("adaln_layer")
        needed = ctx.needs_input_grad
        if dout is None:
            return (None,) * len(needed)
        last = is_last_to_read()
        # a layer after this one may be differentiated later than this, for a loss between layers
        owned = last and not ctx.turn.is_read()
        modulation, rotary, *saved = ctx.saved_tensors
        weights, saved = LayerWeights(*saved[:WEIGHTS]), saved[WEIGHTS:]
        kept = tensors.Kept(tensors.Activations(*saved[:KEPT]), owned=owned)
        start, *sums = saved[KEPT:]
        if last:
            # nothing but kept holds what the forward kept, so each tensor dies with its last use
            ctx.maybe_clear_saved_tensors()
        del saved
        x = tensors.end_of_run(start, sums)
        wanted = zip(LayerWeights._fields, needed[5:], strict=False)
        gradients = Gradients(frozenset(n for n, want in wanted if want), weights.qkv_weight.dtype)
        # kept from the forward, the casts would take 2 bytes for each parameter of a block at the
        # peak of its step: to read 4 bytes and write 2 again costs far less than that memory
        w = LayerWeights(*cast(weights, ctx.options.norm.dtype))
        call = LayerCall(x, modulation, rotary, w, ctx.options)
        with dtypes_as_they_are(dout.device.type):
            dx, dmodulation = passes.backward(call, dout.contiguous(), kept, gradients)
        dweights = cast([gradients.sums.get(name) for name in w._fields], gradients.dtype)
        if last:
            ctx.turn.is_done = True
        return None, None, dx, dmodulation, None, *dweights, *(None,) * (len(needed) - 5 - WEIGHTS)


# public


def adaln_layer(
    x: Tensor,
    modulation: Tensor,
    weights: LayerWeights,
    *,
    num_heads: int,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    recompute: Recompute = "none",
    stream: ResidualStream | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """Run one AdaLN layer, keeping for its backward what the policy says.

    The branches run in the dtype of the weights, or in autocast's; the residual stream keeps that
    of x. The backward writes over what it kept, unless it is told to retain the graph.

    Args:
        x:           (B, T, D)  residual stream: float32, bfloat16 or float16
        modulation:  (B, 6 D) per sample or (B, T, 6 D) per token: shift, scale and gate of the
                     attention branch, then of the MLP
        weights:     of one dtype, as `LayerWeights` tells their shapes
        num_heads:   divides D
        rotary:      (2, T, D / num_heads) cosines and sines, float32; None does not rotate
        mlp:         "gelu" (tanh), "gelu_exact" or "swiglu"
        norm:        "layer", or "rms", which does not subtract the mean
        eps:         of the norms, in units of x**2
        recompute:   a name of `POLICIES`
        stream:      of the stack that this layer stands in: spares most layers keeping x
        num_queries: 1 to T: the first so many tokens' results alone, for which all T are keys and
                     values; None is T. What only others need is neither computed nor kept
    Returns:
        (B, T or num_queries, D), dtype of x.
    Raises:
        ValueError: a shape, dtype or device disagrees, a name is unknown, or num_queries is not
            from 1 to T.
        RuntimeError: the gradient is differentiated.
    """
    check_choice("mlp", mlp, ACTIVATIONS)
    check_choice("recompute", recompute, POLICIES)
    dtype = compute_dtype(x, weights.qkv_weight)
    norms = NormOptions(eps, checks.check_norm(norm), dtype)
    options = LayerOptions(num_heads, mlp, norms, recompute, num_queries)
    _check(LayerCall(x, modulation, rotary, weights, options))
    if num_queries == x.shape[1]:
        options = options._replace(num_queries=None)
    x, modulation = x.contiguous(), checks.as_rows(modulation)
    if modulation.stride(-1) != 1:  # kernels read columns that follow each other
        modulation = modulation.contiguous()
    run, turn = ((x.detach(),), Turn()) if stream is None else stream.run_to(x)
    out, a, m = _AdaLNLayer.apply(options, turn, x, modulation, rotary, *weights, *run)
    if stream is not None and options.num_queries is None and out.requires_grad and a is not None:
        mod = tensors.LayerModulation.of(modulation)
        stream.extend(run, turn, out, mod.gate1, a, mod.gate2, m)
    return out


def _check(call: LayerCall) -> None:
    """Shapes, dtypes and devices of one call."""
    x, modulation, rotary, w, options = call
    checks.check_floats(x=x, modulation=modulation, rotary=rotary, **w._asdict())
    checks.check_tokens(x=x)
    B, T, D = x.shape
    if tuple(modulation.shape) not in ((B, 6 * D), (B, T, 6 * D)):
        raise ValueError(
            f"modulation must be (B, 6 D) = ({B}, {6 * D}) or (B, T, 6 D) = ({B}, {T}, {6 * D}), "
            f"got {tuple(modulation.shape)}"
        )
    if options.num_heads < 1 or D % options.num_heads:
        raise ValueError(f"num_heads must divide D = {D}, got {options.num_heads}")
    d = D // options.num_heads
    check_head_width(x.device, d)
    tensors.check_first(options.num_queries, T)
    checks.check_heads(*w.qk_norms, rotary, T, d)
    first, hidden, dtype = len(w.fc1_weight), w.fc2_weight.shape[-1], w.qkv_weight.dtype
    expected = LayerWeights(
        (3 * D, D), (3 * D,), (D, D), (D,),
        (2 * hidden if options.mlp == "swiglu" else hidden, D), (first,), (D, hidden), (D,),
        (d,), (d,),
    )  # fmt: skip
    for name, t, shape in zip(w._fields, w, expected, strict=True):
        checks.check_shape(shape, **{name: t})
        if t is not None and t.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of qkv_weight, {dtype}, got {t.dtype}")
