"""A projection's bias and GELU in its tanh form, rounding once; the bias is not the matmul's.

    u = x * s,    x = h + bias,    s = sigmoid(2 * z),    z = sqrt(2 / pi) * (x + CUBIC * x**3)

Hendrycks & Gimpel 2016 (arXiv:1606.08415), with 0.5 * (1 + tanh(z)) = sigmoid(2 * z).

Backward, from h alone:

    dh    = du * (s + x * s * (1 - s) * 2 * z'),    z' = sqrt(2 / pi) * (1 + 3 * CUBIC * x**2)
    dbias = sum_n dh
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._norm import statistics_dtype
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.columns import (
    Share,
    add_bias,
    check_bias,
    chunks,
    columns,
    launch_backward,
    launch_forward,
    load_bias,
    load_tile,
    same_dtype,
)
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import SHARED_OUT

CUBIC = 0.044715
SLOPE = 2 * math.sqrt(2 / math.pi)  # of 2 * z at 0
# a kernel reads no other kind of global
_CUBIC, _SLOPE = tl.constexpr(CUBIC), tl.constexpr(SLOPE)

FORWARD = Share(rows=4, registers=88)
BACKWARD = Share(rows=2, registers=96)

# kernels


@triton.jit
def _sigmoid_2z(x):
    # a cube that overflows is an infinity of the right sign, and its sigmoid is 0 or 1
    return tl.sigmoid(x * _SLOPE * (x * x * _CUBIC + 1))


@triton.jit(do_not_specialize=SHARED_OUT)
def _fwd_kernel(
    h_ptr, bias_ptr,  # (N, F), (F,)
    u_ptr,            # (N, F)
    N, F, rows_per_program,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = columns(N, F, rows_per_program, BLOCK_F)
    bias = load_bias(bias_ptr, cols, cols < F)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = row * F + cols, (row < last) & (cols < F)
        x = load_tile(h_ptr + at, mask) + bias

        tl.store(u_ptr + at, x * _sigmoid_2z(x), mask=mask)


@triton.jit(do_not_specialize=SHARED_OUT)
def _bwd_kernel(
    h_ptr, du_ptr, bias_ptr,   # (N, F), (N, F), (F,)
    dh_ptr, u_ptr, dbias_ptr,  # (N, F), (N, F), (splits, F)
    N, F, rows_per_program,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = columns(N, F, rows_per_program, BLOCK_F)
    bias = load_bias(bias_ptr, cols, cols < F)
    dbias = tl.zeros((1, BLOCK_F), tl.float32)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = row * F + cols, (row < last) & (cols < F)
        x = load_tile(h_ptr + at, mask) + bias
        # 0 in the rows past the last, which then add nothing to dbias
        du = load_tile(du_ptr + at, mask)

        s = _sigmoid_2z(x)
        # from left to right: x * s * (1 - s) is 0 before x * x can be large
        dh = du * (s + x * s * (1 - s) * (_SLOPE + x * x * (3 * _CUBIC * _SLOPE)))
        dbias += tl.sum(dh, axis=0)[None, :]

        tl.store(dh_ptr + at, dh, mask=mask)
        if u_ptr is not None:
            tl.store(u_ptr + at, x * s, mask=mask)

    # each program owns one row of partial sums: no atomics, so every run gives the same bits
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(1).to(tl.int64) * F + cols, dbias, mask=cols < F)


# launchers: they write into tensors of their caller


def _forward_triton(h, bias, u):
    launch_forward(_fwd_kernel, FORWARD, h, bias, u)


def _forward_torch(h, bias, u):
    for h_rows, u_rows, x, s in chunks(2, h, u):
        add_bias(h_rows, bias, x)
        _sigmoid_2z_torch(x, torch.mul(x, x, out=s), s)
        torch.mul(x, s, out=u_rows)


def _backward_triton(h, du, bias, dh, u, dbias):
    launch_backward(_bwd_kernel, BACKWARD, h, du, bias, dh, u, dbias)


def _backward_torch(h, du, bias, dh, u, dbias):
    if dbias is not None:
        dbias.zero_()
    for h_rows, du_rows, dh_rows, u_rows, x, x2, s, grad in chunks(4, h, du, dh, u):
        grad = same_dtype(dh_rows, grad)
        add_bias(h_rows, bias, x)
        _sigmoid_2z_torch(x, torch.mul(x, x, out=x2), s)
        torch.ops.aten.sigmoid_backward.grad_input(x, s, grad_input=grad)  # x * s * (1 - s)
        grad.addcmul_(grad, x2, value=3 * CUBIC)
        torch.add(s, grad, alpha=SLOPE, out=grad).mul_(du_rows)
        if dbias is not None:
            dbias += grad.sum(0)
        if grad is not dh_rows:
            dh_rows.copy_(grad)
        # last, because u may be du
        if u_rows is not None:
            torch.mul(x, s, out=u_rows)


def _sigmoid_2z_torch(x: Tensor, x2: Tensor, s: Tensor) -> None:
    torch.addcmul(x, x, x2, value=CUBIC, out=s).mul_(SLOPE).sigmoid_()


_forward_op = register(
    "gelu_fwd(Tensor h, Tensor? bias, Tensor(a!) u) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_backward_op = register(
    "gelu_bwd(Tensor h, Tensor du, Tensor? bias, Tensor(a!) dh, Tensor(b!)? u,"
    " Tensor(c!)? dbias) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def gelu_forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """u (N, F) in the dtype of h, from contiguous h (N, F) and bias (F,)."""
    u = torch.empty_like(h)
    if h.numel():
        _forward_op(h, bias, u)
    return u


def gelu_backward(
    h: Tensor,
    du: Tensor,
    bias: Tensor | None,
    *,
    dh: Tensor,
    u: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Writes dh and u (N, F), and dbias (F,), which is float32; all contiguous.

    dh may be h itself and u may be du itself: each element is read before it is written. u is the
    activation again; None of u and dbias is not computed.
    """
    if h.numel():
        _backward_op(h, du, bias, dh, u, dbias)
    elif dbias is not None:
        dbias.zero_()


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bias):
        ctx.save_for_backward(h, bias)
        return gelu_forward(h, bias)

    @staticmethod
    def backward(ctx, du):
        checks.refuse_double_backward("gelu")
        h, bias = ctx.saved_tensors
        dh, dbias = torch.empty_like(h), None
        if ctx.needs_input_grad[1]:
            dbias = torch.empty_like(bias, dtype=statistics_dtype(h))
        gelu_backward(h, du.contiguous(), bias, dh=dh, u=None, dbias=dbias)
        return dh, None if dbias is None else dbias.to(bias.dtype)


# public


def gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add a projection's bias and take GELU in its tanh form.

    Args:
        h:     (..., F)  a matmul's output without its bias: float32, bfloat16 or float16
        bias:  (F,)      of any of these dtypes, or None
    Returns:
        (..., F), dtype of h. The bias is added in float32 and the result rounded once.
    Raises:
        ValueError: a shape, dtype or device disagrees.
        RuntimeError: the gradient is differentiated.
    """
    checks.check_floats(h=h, bias=bias)
    if h.dim() == 0 or h.shape[-1] == 0:
        raise ValueError(f"h must be (..., F) with F at least 1, got {tuple(h.shape)}")
    check_bias(bias, "F", h.shape[-1])
    bias = None if bias is None else bias.contiguous()
    return _Gelu.apply(h.contiguous().view(-1, h.shape[-1]), bias).view(h.shape)
