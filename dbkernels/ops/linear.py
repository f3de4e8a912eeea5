"""A linear map of a condition, which keeps no copy of its weight.

    y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum dy

Under autocast torch keeps a rounded copy of W for the backward. For a condition's projection, with
few rows and 6 D columns, that copy is larger than all else it keeps; casting again costs little.
"""

import torch
from torch import Tensor

from dbkernels.ops import _door
from dbkernels.ops._graph import compute_dtype, dtypes_as_they_are
from dbkernels.ops._projection import as_rows, project


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(dtype)
        return project(x.to(dtype), weight.to(dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        _door.refuse_double_backward("linear")
        x, weight = ctx.saved_tensors
        dy, needed = dy.contiguous(), ctx.needs_input_grad
        dx = dweight = dbias = None
        with dtypes_as_they_are(dy.device.type):
            if needed[0]:
                dx = project(dy, weight.to(ctx.dtype).T).to(x.dtype)
            if needed[1]:
                dweight = (as_rows(dy).T @ as_rows(x).to(ctx.dtype)).to(weight.dtype)
            if needed[2]:
                dbias = as_rows(dy).sum(0).to(ctx.bias_dtype)
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
    _door.check_floats(x=x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            "x and weight must be (..., D_in) and (D_out, D_in), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    return _Linear.apply(x.contiguous(), weight, bias, compute_dtype(x, weight))
