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
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.attention import check_head_width
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, is_last_to_read
from dbkernels.ops.layer import passes, tensors
from dbkernels.ops.layer.condition import ModulationGradient, rows_of_modulation
from dbkernels.ops.layer.flat import Form, flatten
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.modulation import DualModulation, KeyModulation, LayerModulation
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.shapes import ATTENTION, KEYS, PROJECTIONS, check_weights
from dbkernels.ops.layer.tensors import LayerCall, LayerOptions
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.settings import check_choice

KEPT = len(tensors.Activations._fields)
GIVEN = 6  # arguments of the function before the weights

# autograd


class _Told(NamedTuple):
    """What is no tensor: of the context's stream, then of x's."""

    options: tuple[LayerOptions, LayerOptions]
    forms: tuple[Form, ...]
    """Of the weights of each, and of a second attention where x has one."""

    def rows(self, flat: Sequence) -> list[Sequence]:
        """What belongs to the weights of each."""
        ends = list(accumulate(map(len, self.forms), initial=0))
        return [flat[start:end] for start, end in pairwise(ends)]

    def calls(
        self,
        streams: Sequence[Tensor],
        modulations: Sequence[Tensor],
        rotary: Tensor | None,
        flat: Sequence[Tensor | None],
        scales: Sequence[Tensor | None] = (None, None),
    ) -> passes.Streams:
        """Of streams, modulations and scales in that order."""
        T, dtype = streams[0].shape[1], self.options[0].norm1.dtype
        tables = (rotary, rotary)
        if rotary is not None:
            tables = rotary[:, :T].contiguous(), rotary[:, T:].contiguous()
        whole = [
            form.whole(row, dtype) for form, row in zip(self.forms, self.rows(flat), strict=True)
        ]
        each = zip(streams, modulations, tables, whole[:2], self.options, scales, strict=True)
        context, x = (LayerCall(*call) for call in each)
        return context, x._replace(second=whole[2] if len(whole) > 2 else None)

    def gradients(
        self, needed: Sequence[bool], flat: Sequence[Tensor | None], calls: passes.Streams
    ) -> list[Gradients]:
        """Sums for those of the weights; the second attention's stand beside those of x too."""
        context, x = calls
        weights = context.weights, x.weights, x.second
        each = zip(self.forms, self.rows(needed), self.rows(flat), weights, strict=False)
        grads = [form.gradients(*own) for form, *own in each]
        grads[1].second = grads[2] if len(grads) > 2 else None
        return grads

    def apart(
        self, grads: Sequence[Gradients], flat: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the row's tensors."""
        each = zip(self.forms, grads, self.rows(flat), strict=True)
        return [grad for form, *own in each for grad in form.apart(*own)]


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
        grads = told.gradients(needed[GIVEN:], weights, calls)
        dmodulations = [ModulationGradient(modulation) for modulation in modulations]
        # a result that nothing reads has a gradient of zeros
        douts = [
            streams[0].new_zeros(shape, dtype=dtype) if dout is None else dout.contiguous()
            for dout, (shape, dtype) in zip(douts, ctx.results, strict=True)
        ]
        with dtypes_as_they_are(douts[0].device.type):
            dxs = passes.backward(passes.JOINT, calls, douts, kept, grads[:2], dmodulations)
        dmods = [total for each in dmodulations for total in each.results()]
        return None, *dxs, *dmods, None, *told.apart(grads, weights)


def _apart(saved: Sequence[Tensor | None]) -> tuple[Sequence, ...]:
    """Streams, modulations, rotary and scales, what was kept of each stream, and weights."""
    start, kept = 7, saved[7:]
    made = kept[:KEPT], kept[KEPT : 2 * KEPT]
    return saved[:2], saved[2:4], saved[4:start], made, kept[2 * KEPT :]


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
    each = {"context_weights": context_weights, "weights": weights}
    if second_weights is not None:
        each["second_weights"] = second_weights
    given = {"x": x, "modulation": modulation}
    given |= {"context": context, "context_modulation": context_modulation, "rotary": rotary}
    for name, w in each.items():
        given |= {f"{name}.{n}": t for n, t in zip(w.names(), w.tensors(), strict=True)}
    checks.check_floats(**given)
    _check_modulation("modulation", modulation, x, of_x)
    _check_modulation("context_modulation", context_modulation, context, of_context)
    _check_weights(x, context, rotary, each, of_x, head_dim)
    rows, forms = zip(*map(flatten, each.values()), strict=True)
    context, x = _JointLayer.apply(
        _Told((of_context, of_x), forms),
        context.contiguous(),
        x.contiguous(),
        rows_of_modulation(context_modulation),
        rows_of_modulation(modulation),
        rotary,
        *chain.from_iterable(rows),
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
    options: LayerOptions,
    d: int | None,
) -> None:
    D, T, H = x.shape[-1], context.shape[1] + x.shape[1], options.num_heads
    if H < 1 or (d is None and D % H):
        raise ValueError(f"num_heads must divide D = {D}, got {H}")
    d = D // H if d is None else d
    if d < 1:
        raise ValueError(f"head_dim must be at least 1, got {d}")
    check_head_width(x.device, d)
    keys_only = weights["context_weights"].out_weight is None
    has = {"context_weights": KEYS if keys_only else PROJECTIONS, "second_weights": ATTENTION}
    dtype, ranks = weights["weights"].qkv_weight.dtype, weights["weights"].ranks
    for name, w in weights.items():
        width, of = context.shape[-1] if name == "context_weights" else D, has.get(name)
        check_weights(f"{name}.", w, width, H * d, d, mlp=options.mlp, has=of or PROJECTIONS)
        if w.qkv_weight.dtype != dtype:
            got = w.qkv_weight.dtype
            raise ValueError(f"{name} must have the dtype of weights, {dtype}, got {got}")
        if w.ranks is not ranks:
            sizes = [None if each is None else each.size for each in (ranks, w.ranks)]
            raise ValueError(f"{name} must have the ranks of weights, {sizes[0]}, got {sizes[1]}")
        checks.check_heads(*w.qk_norms, rotary, T, d)
