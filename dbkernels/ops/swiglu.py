"""A projection's bias and the gate of SwiGLU, rounding once; the bias is not the matmul's.

    u = a * s * b,    (a | b) = h + bias,    s = sigmoid(a)

Shazeer 2020 (arXiv:2002.05202); a * s is silu(a).

Backward, from h alone:

    da    = du * b * (s + a * s * (1 - s))
    db    = du * a * s
    dbias = sum_n (da | db)
"""

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

FORWARD = Share(rows=4, registers=64)
BACKWARD = Share(rows=2, registers=128)

# kernels


@triton.jit(do_not_specialize=SHARED_OUT)
def _fwd_kernel(
    h_ptr, bias_ptr,  # (N, 2 F), (2 F,)
    u_ptr,            # (N, F)
    N, F, rows_per_program,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = columns(N, F, rows_per_program, BLOCK_F)
    bias_a = load_bias(bias_ptr, cols, cols < F)
    bias_b = load_bias(bias_ptr, F + cols, cols < F)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = 2 * row * F + cols, (row < last) & (cols < F)
        a = load_tile(h_ptr + at, mask) + bias_a
        b = load_tile(h_ptr + at + F, mask) + bias_b

        tl.store(u_ptr + row * F + cols, a * tl.sigmoid(a) * b, mask=mask)


@triton.jit(do_not_specialize=SHARED_OUT)
def _bwd_kernel(
    h_ptr, du_ptr, bias_ptr,   # (N, 2 F), (N, F), (2 F,)
    dh_ptr, u_ptr, dbias_ptr,  # (N, 2 F), (N, F), (splits, 2 F)
    N, F, rows_per_program,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = columns(N, F, rows_per_program, BLOCK_F)
    bias_a = load_bias(bias_ptr, cols, cols < F)
    bias_b = load_bias(bias_ptr, F + cols, cols < F)
    dbias_a = tl.zeros((1, BLOCK_F), tl.float32)
    dbias_b = tl.zeros((1, BLOCK_F), tl.float32)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = 2 * row * F + cols, (row < last) & (cols < F)
        a = load_tile(h_ptr + at, mask) + bias_a
        b = load_tile(h_ptr + at + F, mask) + bias_b
        # 0 in the rows past the last, which then add nothing to dbias
        du = load_tile(du_ptr + row * F + cols, mask)

        s = tl.sigmoid(a)
        da = du * b * (s + a * s * (1 - s))
        db = du * (a * s)
        dbias_a += tl.sum(da, axis=0)[None, :]
        dbias_b += tl.sum(db, axis=0)[None, :]

        tl.store(dh_ptr + at, da, mask=mask)
        tl.store(dh_ptr + at + F, db, mask=mask)
        if u_ptr is not None:
            tl.store(u_ptr + row * F + cols, a * s * b, mask=mask)

    # each program owns one row of partial sums: no atomics, so every run gives the same bits
    if dbias_ptr is not None:
        at = tl.program_id(1).to(tl.int64) * 2 * F + cols
        tl.store(dbias_ptr + at, dbias_a, mask=cols < F)
        tl.store(dbias_ptr + at + F, dbias_b, mask=cols < F)


# launchers: they write into tensors of their caller


def _forward_triton(h, bias, u):
    launch_forward(_fwd_kernel, FORWARD, h, bias, u)


def _forward_torch(h, bias, u):
    for h_rows, u_rows, x in chunks(1, h, u):
        add_bias(h_rows, bias, x)
        a, b = x.chunk(2, dim=1)
        torch.mul(torch.ops.aten.silu_(a), b, out=u_rows)


def _backward_triton(h, du, bias, dh, u, dbias):
    launch_backward(_bwd_kernel, BACKWARD, h, du, bias, dh, u, dbias)


def _backward_torch(h, du, bias, dh, u, dbias):
    if dbias is not None:
        dbias.zero_()
    for h_rows, du_rows, dh_rows, u_rows, x, grad in chunks(2, h, du, dh, u):
        grad = same_dtype(dh_rows, grad)
        add_bias(h_rows, bias, x)
        a, b = x.chunk(2, dim=1)
        da, db = grad.chunk(2, dim=1)
        torch.mul(du_rows, b, out=da)
        torch.ops.aten.silu_backward.grad_input(da, a, grad_input=da)
        silu = torch.ops.aten.silu_(a)
        torch.mul(du_rows, silu, out=db)
        if dbias is not None:
            dbias += grad.sum(0)
        if grad is not dh_rows:
            dh_rows.copy_(grad)
        # last, because u may be du
        if u_rows is not None:
            torch.mul(silu, b, out=u_rows)


_forward_op = register(
    "swiglu_fwd(Tensor h, Tensor? bias, Tensor(a!) u) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_backward_op = register(
    "swiglu_bwd(Tensor h, Tensor du, Tensor? bias, Tensor(a!) dh, Tensor(b!)? u,"
    " Tensor(c!)? dbias) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def swiglu_forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """u (N, F) in the dtype of h, from contiguous h (N, 2 F) and bias (2 F,)."""
    u = h.new_empty(h.shape[0], h.shape[1] // 2)
    if h.numel():
        _forward_op(h, bias, u)
    return u


def swiglu_backward(
    h: Tensor,
    du: Tensor,
    bias: Tensor | None,
    *,
    dh: Tensor,
    u: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Writes dh (N, 2 F), u (N, F), and dbias (2 F,), which is float32; all contiguous.

    dh may be h itself and u may be du itself: each element is read before it is written. u is the
    activation again; None of u and dbias is not computed.
    """
    if h.numel():
        _backward_op(h, du, bias, dh, u, dbias)
    elif dbias is not None:
        dbias.zero_()


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bias):
        ctx.save_for_backward(h, bias)
        return swiglu_forward(h, bias)

    @staticmethod
    def backward(ctx, du):
        checks.refuse_double_backward("swiglu")
        h, bias = ctx.saved_tensors
        dh, dbias = torch.empty_like(h), None
        if ctx.needs_input_grad[1]:
            dbias = torch.empty_like(bias, dtype=statistics_dtype(h))
        swiglu_backward(h, du.contiguous(), bias, dh=dh, u=None, dbias=dbias)
        return dh, None if dbias is None else dbias.to(bias.dtype)


# public


def swiglu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add a projection's bias and gate its second half with silu of the first.

    Args:
        h:     (..., 2 F)  a matmul's output without its bias: float32, bfloat16 or float16
        bias:  (2 F,)      of any of these dtypes, or None
    Returns:
        (..., F), dtype of h. The bias is added in float32 and the result rounded once.
    Raises:
        ValueError: a shape, dtype or device disagrees.
        RuntimeError: the gradient is differentiated.
    """
    checks.check_floats(h=h, bias=bias)
    if h.dim() == 0 or h.shape[-1] == 0 or h.shape[-1] % 2:
        raise ValueError(f"h must be (..., 2 F) with F at least 1, got {tuple(h.shape)}")
    check_bias(bias, "2 F", h.shape[-1])
    bias = None if bias is None else bias.contiguous()
    u = _Swiglu.apply(h.contiguous().view(-1, h.shape[-1]), bias)
    return u.view(*h.shape[:-1], h.shape[-1] // 2)
