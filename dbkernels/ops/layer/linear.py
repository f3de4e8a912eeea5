"""A linear map of a condition, which keeps no copy of its weight.

    y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum dy

Under autocast torch keeps a rounded copy of W for the backward. For a condition's projection, with
few rows and 6 D columns, that copy is larger than all else it keeps; casting again costs little.
"""

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.graph import compute_dtype, dtypes_as_they_are
from dbkernels.ops.layer.cast import cast
from dbkernels.ops.layer.projection import as_rows, product, project, sum_dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return project(*cast([x, weight, bias], dtype))

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("linear")
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows, shape, dtypes = as_rows(dy.contiguous()), x.shape, (x.dtype, weight.dtype)
        dx = dweight = dbias = None
        with dtypes_as_they_are(dy.device.type):
            read = x if needed[1] else None, weight if needed[0] else None
            x, weight = cast(read, ctx.dtype)
            if needed[0]:
                dx = product(rows, weight, sum_dtype(rows, dtypes[0])).to(dtypes[0]).view(shape)
            del weight, read
            if needed[1]:
                dweight = product(rows.T, as_rows(x), sum_dtype(rows, dtypes[1])).to(dtypes[1])
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
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    return _Linear.apply(x.contiguous(), weight, bias, compute_dtype(x, weight))
