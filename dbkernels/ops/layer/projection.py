"""A linear map of a condition, which keeps no copy of its weight."""

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are
from dbkernels.ops.layer.gradients import cast, product, sum_dtype
from dbkernels.ops.layer.linear import Linear, as_rows


class _Linear(torch.autograd.Function):
    """Under autocast torch keeps a rounded copy of W for the backward.

    For a condition's projection, with few rows and 6 D columns, that copy is larger than all else
    it keeps; casting again costs little.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        x, *linear = cast([x, weight, bias], dtype)
        return Linear(*linear).of(x)

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("linear")
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        rows, dx, dweight, dbias = as_rows(dy.contiguous()), None, None, None
        with dtypes_as_they_are(dy.device.type):
            read = cast([x if needed[1] else None, weight if needed[0] else None], ctx.dtype)
            if needed[0]:  # the weight's copy dies with its only use
                dx = product(rows, read.pop(), sum_dtype(rows, x.dtype)).to(x.dtype).view(x.shape)
            if needed[1]:
                dtype = weight.dtype
                dweight = product(rows.T, as_rows(read[0]), sum_dtype(rows, dtype)).to(dtype)
            if needed[2]:
                dbias = rows.sum(0, dtype=sum_dtype(rows, ctx.bias_dtype)).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the dtype of the weight or in autocast's.

    Args:
        x:       (..., D_in)     float32, bfloat16 or float16, on a CPU also float64
        weight:  (D_out, D_in)   of any of these dtypes
        bias:    (D_out,)        of any of these dtypes, or None
    Returns:
        (..., D_out).
    Raises:
        ValueError: a shape, dtype or device disagrees.
        RuntimeError: the gradient is differentiated.
    """
    checks.check_floats(x=x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            "x and weight must be (..., D_in) and (D_out, D_in), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.check_shape(weight.shape[:1], bias=bias)
    return _Linear.apply(x.contiguous(), weight, bias, compute_dtype(x, weight))
