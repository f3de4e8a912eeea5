"""A linear map of a condition, which keeps no copy of its weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are
from dbkernels.ops.layer.gradients import Gradients, add_product, cast, product, sum_dtype
from dbkernels.ops.layer.linear import (
    Adapter,
    Linear,
    adapter_names,
    as_rows,
    check_adapter,
    flat_adapters,
    with_adapters,
)
from dbkernels.ops.layer.ranks import Ranks, sum_or_not
from dbkernels.settings import check_choice

NAME = "linear"  # of the projection, to its adapters


class _Linear(torch.autograd.Function):
    """Under autocast torch keeps a rounded copy of W for the backward.

    For a condition's projection, with few rows and 6 D columns, that copy is larger than all else
    it keeps; casting again costs little.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype, adapters, ranks, *small):
        ctx.save_for_backward(x, weight, *small)
        ctx.ranks = ranks
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        ctx.adapters = adapters
        x, weight, bias, *small = cast([x, weight, bias, *small], dtype)
        y = Linear(weight, bias, with_adapters(adapters, small)).of(x)
        return y if ranks is None else ranks.gather(y)

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("linear")
        (x, weight, *small), needed, ranks = ctx.saved_tensors, ctx.needs_input_grad, ctx.ranks
        dy = dy if ranks is None else ranks.own(dy)
        rows, dx, dweight, dbias = as_rows(dy.contiguous()), None, None, None
        names = adapter_names(ctx.adapters)
        wanted = frozenset(n for n, want in zip(names, needed[6:], strict=True) if want)
        with dtypes_as_they_are(dy.device.type):
            adapters = with_adapters(ctx.adapters, cast(small, ctx.dtype))
            reads_x = needed[1] or wanted
            read = cast([x if reads_x else None, weight if needed[0] else None], ctx.dtype)
            if needed[0]:  # the weight's copy dies with its only use
                dx = product(rows, read.pop(), sum_dtype(rows, x.dtype))
                for adapter in adapters:
                    add_product(dx, adapter.narrow_back(rows), adapter.down)
                sum_or_not(ranks, dx)
                dx = dx.to(x.dtype).view(x.shape)
            if needed[1]:
                dtype = weight.dtype
                dweight = product(rows.T, as_rows(read[0]), sum_dtype(rows, dtype)).to(dtype)
            if needed[2]:
                dbias = rows.sum(0, dtype=sum_dtype(rows, ctx.bias_dtype)).to(ctx.bias_dtype)
            grads = Gradients(wanted, ctx.dtype, adapters)
            if wanted:
                grads.add_adapters(NAME, rows, read[0])
        return dx, dweight, dbias, None, None, None, *grads.results(names, [t.dtype for t in small])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    ranks: Ranks | None = None,
) -> Tensor:
    """x W^T + b, in the dtype of the weight or in autocast's.

    Args:
        x:       (..., D_in)     float32, bfloat16 or float16, on a CPU also float64
        weight:  (D_out, D_in)   of any of these dtypes
        bias:    (D_out,)        of any of these dtypes, or None
        adapters: of the projection "linear", of any of these dtypes
        ranks:   each of which has some of the outputs, in order; None has all. x is the same on all
    Returns:
        (..., D_out), of all ranks.
    Raises:
        ValueError: a shape, dtype or device disagrees, or there are adapters with ranks, or ranks
            under torch.compile.
        RuntimeError: the gradient is differentiated.
    """
    small = flat_adapters(adapters)
    named = dict(zip(adapter_names(adapters), small, strict=True))
    checks.check_floats(x=x, weight=weight, bias=bias, **named)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            "x and weight must be (..., D_in) and (D_out, D_in), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.check_shape(weight.shape[:1], bias=bias)
    if ranks is not None and adapters:
        raise ValueError(f"adapters must be none with ranks, got {len(adapters)}")
    if ranks is not None and torch.compiler.is_compiling():
        raise ValueError(f"ranks must be None under torch.compile, got {ranks.size} ranks")
    for adapter in adapters:
        check_choice("projection of an adapter", adapter.projection, (NAME,))
        check_adapter(adapter, weight)
    dtype, bare = compute_dtype(x, weight), with_adapters(adapters, [None] * len(small))
    return _Linear.apply(x.contiguous(), weight, bias, dtype, bare, ranks, *small)
