"""A layer of two residual streams with one attention over both, as one autograd function.

    y, z = norm of x and of the context, each modulated by its own
    a, b = attention([z, y]), of which each stream's tokens go through its own projections
    x1   = x + gate1 * a (+ gate3 * a2),    out = x1 + gate2 * mlp((1 + scale2) * norm(x1) + shift2)

and for the context likewise, with weights of its own. Esser et al. 2024 (arXiv:2403.03206), section
4; a2 is SD3.5's second attention, of x with itself, from a second modulation of the norm of x. The
context's tokens come first, as in Flux.

What is kept is that of `recompute` for each stream, so these are the units at "none", for a token
of x and for one of the context, of D elements:

                   x   qkv  attended  a   hidden  m
    x              1    3      1      1     4     1    11, and with a second attention
                   +    3      1      1                 5 more: 16
    context        1    3      1      1     4     1    11
      keys only    1    2                               3

"attention" leaves out what was attended to (9 + 1 and 14 of the 16), "mlp" hidden, and "qkv" hidden
and q, k, v, of either attention. The joined q, k and v exist while the attention runs alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.attention import check_head_width
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, is_last_to_read
from dbkernels.ops.layer import passes, stacked, tensors
from dbkernels.ops.layer.condition import ModulationGradient, rows_of_modulation
from dbkernels.ops.layer.gradients import Gradients, cast
from dbkernels.ops.layer.modulation import DualModulation, KeyModulation, LayerModulation
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.shapes import ATTENTION, KEYS, check_weights
from dbkernels.ops.layer.tensors import LayerCall, LayerOptions, LayerWeights
from dbkernels.settings import check_choice

WEIGHTS, KEPT = len(LayerWeights._fields), len(tensors.Activations._fields)
GIVEN = 6  # arguments of the function before the weights

# autograd


class _Told(NamedTuple):
    """What is no tensor: of the context's stream, then of x's."""

    options: tuple[LayerOptions, LayerOptions]
    layout: stacked.Layout
    """Of the tensors of the weights: the context's, those of x, and of a second attention."""

    def calls(
        self,
        streams: Sequence[Tensor],
        modulations: Sequence[Tensor],
        rotary: Tensor | None,
        weights: Sequence[Tensor | None],
        scales: Sequence[Tensor | None] = (None, None),
    ) -> passes.Streams:
        """Of streams, modulations and scales in that order."""
        T = streams[0].shape[1]
        tables = (rotary, rotary)
        if rotary is not None:
            tables = rotary[:, :T].contiguous(), rotary[:, T:].contiguous()
        whole = stacked.whole(weights, self.layout, self.options[0].norm1.dtype)
        of_context, of_x, *second = (LayerWeights(*own) for own in _each(whole))
        each = zip(
            streams, modulations, tables, (of_context, of_x), self.options, scales, strict=True
        )
        context, x = (LayerCall(*call) for call in each)
        return context, x._replace(second=second[0] if second else None)

    def gradients(self, needed: Sequence[bool], dtype: torch.dtype) -> list[Gradients]:
        """Of the weights, the second attention's beside those of x too."""
        wanted = _each(stacked.wanted(needed, self.layout))
        names = (zip(LayerWeights._fields, own, strict=True) for own in wanted)
        grads = [Gradients(frozenset(n for n, want in own if want), dtype) for own in names]
        grads[1].second = grads[2] if len(grads) > 2 else None
        return grads


class _JointLayer(torch.autograd.Function):
    """(context, x); the context's result has no tokens where it is only keys and values."""

    @staticmethod
    def forward(ctx, told, context, x, context_modulation, modulation, rotary, *weights):
        modulations = context_modulation, modulation
        calls = told.calls((context, x), modulations, rotary, weights)
        outs, kept = passes.forward(passes.JOINT, calls)
        streams, scales = (context, x), (None, None)
        if POLICIES[told.options[0].recompute].narrow:
            streams, scales = zip(*map(passes.narrowed, calls), strict=True)
        made = (t for own in kept for t in own)
        ctx.save_for_backward(*streams, *modulations, rotary, *scales, *made, *weights)
        ctx.set_materialize_grads(False)
        ctx.told, ctx.results = told, [(out.shape, out.dtype) for out in outs]
        return tuple(outs)

    @staticmethod
    def backward(ctx, *douts):
        checks.refuse_double_backward("joint_layer")
        needed, told = ctx.needs_input_grad, ctx.told
        if all(dout is None for dout in douts):
            return (None,) * len(needed)
        owned = is_last_to_read()
        streams, modulations, (rotary, *scales), made, weights = _apart(ctx.saved_tensors)
        kept = [tensors.Kept(tensors.Activations(*own), owned=owned) for own in made]
        if owned:
            # nothing but kept holds what the forward kept, so each tensor dies with its last use
            ctx.maybe_clear_saved_tensors()
        del made
        calls = told.calls(streams, modulations, rotary, weights, scales)
        grads = told.gradients(needed[GIVEN:], weights[0].dtype)
        dmodulations = [ModulationGradient(modulation) for modulation in modulations]
        # a result that nothing reads has a gradient of zeros
        douts = [
            streams[0].new_zeros(shape, dtype=dtype) if dout is None else dout.contiguous()
            for dout, (shape, dtype) in zip(douts, ctx.results, strict=True)
        ]
        with dtypes_as_they_are(douts[0].device.type):
            dxs = passes.backward(passes.JOINT, calls, douts, kept, grads[:2], dmodulations)
        sums = [own.sums.get(name) for own in grads for name in LayerWeights._fields]
        dweights = stacked.apart(cast(sums, weights[0].dtype), weights, told.layout)
        dmods = [total for each in dmodulations for total in each.results()]
        return None, *dxs, *dmods, None, *dweights


def _apart(saved: Sequence[Tensor | None]) -> tuple[Sequence, ...]:
    """Streams, modulations, rotary and scales, what was kept of each stream, and weights."""
    start, kept = 7, saved[7:]
    made = kept[:KEPT], kept[KEPT : 2 * KEPT]
    return saved[:2], saved[2:4], saved[4:start], made, kept[2 * KEPT :]


def _each(by_field: Sequence) -> list[Sequence]:
    """What belongs to each `LayerWeights`."""
    return [by_field[start : start + WEIGHTS] for start in range(0, len(by_field), WEIGHTS)]


# public


def joint_layer(
    x: Tensor,
    context: Tensor,
    modulation: Tensor,
    context_modulation: Tensor,
    weights: LayerWeights,
    context_weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    second_weights: LayerWeights | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    recompute: Recompute = "none",
) -> tuple[Tensor, Tensor | None]:
    """Run one layer of two streams, keeping for its backward what the policy says.

    The branches run in the dtype of the weights, or in autocast's; each stream keeps its own. The
    backward writes over what it kept, unless it is told to retain the graph.

    Args:
        x:           (B, S, D)  residual stream: float32, bfloat16 or float16
        context:     (B, T, C)  the other stream, dtype of x; C may be D
        modulation:  (B, 6 D) per sample or (B, S, 6 D) per token: shift, scale and gate of the
                     attention branch, then of the MLP; 9 D with a second attention, whose three
                     come last
        context_modulation:  (B, 6 C) or (B, T, 6 C) likewise; 2 C where the context is only keys
                     and values: scale, then shift
        weights:     of x, of one dtype, as `LayerWeights` tells their shapes; any may be `Stacked`
        context_weights:  of the context, in the dtype of weights, with norms of queries and keys
                     of its own or without. Where the context is only keys and values it has qkv and
                     those norms alone, and None for the rest; nothing reads its queries, which have
                     a gradient of zeros
        num_heads:   H
        head_dim:    d; None is D / H, and then H divides D
        second_weights:  of a second attention of x with itself, without rotation: qkv, out and
                     norms of queries and keys, and None for the rest. None is no such attention
        rotary:      (2, T + S, d) cosines and sines, float32, of the context's tokens first; None
                     does not rotate
        mlp:         "gelu" (tanh), "gelu_exact" or "swiglu", of both streams
        norm:        "layer", or "rms", which does not subtract the mean
        eps:         of the norms, in units of x**2
        qk_eps:      of the norms of queries and keys, in units of their squares
        recompute:   a name of `POLICIES`
    Returns:
        x (B, S, D), and the context (B, T, C), or None where it is only keys and values.
    Raises:
        ValueError: a shape, dtype or device disagrees, a weight is missing or is not for its
            stream, or a name is unknown.
        RuntimeError: the gradient is differentiated.
    """
    check_choice("mlp", mlp, ACTIVATIONS)
    check_choice("recompute", recompute, POLICIES)
    centred, keys_only = checks.check_norm(norm), context_weights.out_weight is None
    _check_streams(x, context)
    norms = [NormOptions(eps, centred, compute_dtype(x, weights.qkv_weight))] * 2
    options = LayerOptions(num_heads, mlp, *norms, qk_eps, recompute)
    of_context, of_x = options, options
    if keys_only:
        of_context = options._replace(wanted=Wanted(tokens=0), layout=KeyModulation)
    if second_weights is not None:
        of_x = options._replace(layout=DualModulation)
    tensors_of = {"weights": weights, "context_weights": context_weights}
    if second_weights is not None:
        tensors_of["second_weights"] = second_weights
    given = {"x": x, "modulation": modulation}
    given |= {"context": context, "context_modulation": context_modulation, "rotary": rotary}
    for name, w in tensors_of.items():
        given |= {f"{name}.{field}": t for field, t in w._asdict().items()}
    checks.check_floats(**given)
    _check_modulation("modulation", modulation, x, of_x)
    _check_modulation("context_modulation", context_modulation, context, of_context)
    _check_weights(x, context, rotary, tensors_of, num_heads, head_dim, mlp)
    flat, layout = stacked.flatten((*context_weights, *weights, *(second_weights or ())))
    context, x = _JointLayer.apply(
        _Told((of_context, of_x), layout),
        context.contiguous(),
        x.contiguous(),
        rows_of_modulation(context_modulation),
        rows_of_modulation(modulation),
        rotary,
        *flat,
    )
    return x, None if keys_only else context


def _check_streams(x: Tensor, context: Tensor) -> None:
    checks.check_tokens(x=x)
    checks.check_tokens(context=context)
    if len(context) != len(x):
        raise ValueError(f"context must have the samples of x, {len(x)}, got {len(context)}")
    if context.dtype != x.dtype:
        raise ValueError(f"context must have the dtype of x, {x.dtype}, got {context.dtype}")


def _check_modulation(name: str, modulation: Tensor, x: Tensor, options: LayerOptions) -> None:
    (B, T, D), parts = x.shape, {DualModulation: 9, LayerModulation: 6, KeyModulation: 2}
    n = parts[options.layout]
    if tuple(modulation.shape) not in ((B, n * D), (B, T, n * D)):
        raise ValueError(
            f"{name} must be (B, {n} D) = ({B}, {n * D}) or (B, tokens, {n} D) = "
            f"({B}, {T}, {n * D}), got {tuple(modulation.shape)}"
        )


def _check_weights(
    x: Tensor,
    context: Tensor,
    rotary: Tensor | None,
    weights: dict[str, LayerWeights],
    H: int,
    d: int | None,
    mlp: str,
) -> None:
    D, T = x.shape[-1], context.shape[1] + x.shape[1]
    if H < 1 or (d is None and D % H):
        raise ValueError(f"num_heads must divide D = {D}, got {H}")
    d = D // H if d is None else d
    if d < 1:
        raise ValueError(f"head_dim must be at least 1, got {d}")
    check_head_width(x.device, d)
    of = {"weights": LayerWeights._fields, "second_weights": ATTENTION}
    of["context_weights"] = LayerWeights._fields
    if weights["context_weights"].out_weight is None:
        of["context_weights"] = KEYS
    dtype = weights["weights"].qkv_weight.dtype
    for name, w in weights.items():
        width = context.shape[-1] if name == "context_weights" else D
        check_weights(name, w, width, H * d, d, mlp=mlp, of=of[name])
        if w.qkv_weight.dtype != dtype:
            got = w.qkv_weight.dtype
            raise ValueError(f"{name} must have the dtype of weights, {dtype}, got {got}")
        checks.check_heads(*w.qk_norms, rotary, T, d)
