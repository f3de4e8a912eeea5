"""A projection's bias and its activation, rounding once; the bias is not the matmul's.

GELU in its tanh form, Hendrycks & Gimpel 2016 (arXiv:1606.08415):

    u = x * s,    x = h + bias,    s = sigmoid(2 * z),    z = sqrt(2 / pi) * (x + CUBIC * x**3)

with 0.5 * (1 + tanh(z)) = sigmoid(2 * z). GELU as it is, which its tanh form follows to 5e-4, with
the distribution of the normal:

    u = x * P,    P = 0.5 * (1 + erf(x / sqrt(2)))

SwiGLU, Shazeer 2020 (arXiv:2002.05202):

    u = a * s * b,    (a | b) = h + bias,    s = sigmoid(a)

Backward, from h alone:

    dh    = du * (s + x * s * (1 - s) * 2 * z'),    z' = sqrt(2 / pi) * (1 + 3 * CUBIC * x**2)
    dh    = du * (P + x * exp(-x**2 / 2) / sqrt(2 * pi)),    as it is
    da    = du * b * (s + a * s * (1 - s)),    db = du * a * s
    dbias = sum_n dh

A program owns BLOCK_F columns of u and walks down its share of the rows. A thread keeps its
columns, so sums over rows stay in its registers until the end.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks, sums
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import SHARED_OUT, Share, column_launch

CUBIC = 0.044715
SLOPE = 2 * math.sqrt(2 / math.pi)  # of 2 * z at 0
DENSITY = 1 / math.sqrt(2 * math.pi)  # of the normal at 0
# a kernel reads no other kind of global
_CUBIC, _SLOPE = tl.constexpr(CUBIC), tl.constexpr(SLOPE)
_DENSITY, _SQRT_HALF = tl.constexpr(DENSITY), tl.constexpr(math.sqrt(0.5))
Factors = tuple[Tensor, Tensor]  # whose product is u
CHUNK = 2**17  # elements of plain torch's temporaries, times threads: a core's cache holds four


# kernels


@triton.jit
def _columns(N, F, rows_per_program, BLOCK_F: tl.constexpr):
    """The columns of a program (1, BLOCK_F), its first row, and the row after its last."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    return cols, first, tl.minimum(first + rows_per_program, N)


@triton.jit
def _load_bias(bias_ptr, cols, mask):
    """float32 (1, BLOCK_F); 0 without a bias, where bias_ptr is None."""
    return tl.zeros(cols.shape, tl.float32) if bias_ptr is None else _load(bias_ptr + cols, mask)


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid_2z(x):
    # a cube that overflows is an infinity of the right sign, and its sigmoid is 0 or 1
    return tl.sigmoid(x * _SLOPE * (x * x * _CUBIC + 1))


@triton.jit
def _share(x, EXACT: tl.constexpr):
    """What GELU lets through of x."""
    return 0.5 * (1 + tl.erf(x * _SQRT_HALF)) if EXACT else _sigmoid_2z(x)


@triton.jit(do_not_specialize=SHARED_OUT)
def _fwd_kernel(
    h_ptr, bias_ptr,  # (N, F), (F,); of two halves (N, 2 F), (2 F,)
    u_ptr,            # (N, F)
    N, F, rows_per_program,
    HALVES: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = _columns(N, F, rows_per_program, BLOCK_F)
    bias = _load_bias(bias_ptr, cols, cols < F)
    if HALVES == 2:
        bias_b = _load_bias(bias_ptr, F + cols, cols < F)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = row * F + cols, (row < last) & (cols < F)
        h_at = 2 * row * F + cols if HALVES == 2 else at
        x = _load(h_ptr + h_at, mask) + bias

        if HALVES == 2:
            b = _load(h_ptr + h_at + F, mask) + bias_b
            u = x * tl.sigmoid(x) * b
        else:
            u = x * _share(x, EXACT)
        tl.store(u_ptr + at, u, mask=mask)


@triton.jit(do_not_specialize=SHARED_OUT)
def _bwd_kernel(
    h_ptr, du_ptr, bias_ptr,   # (N, F), (N, F), (F,); of the halves twice as wide
    dh_ptr, u_ptr, dbias_ptr,  # (N, F), (N, F), (splits, F)
    N, F, rows_per_program,
    HALVES: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols, first, last = _columns(N, F, rows_per_program, BLOCK_F)
    bias = _load_bias(bias_ptr, cols, cols < F)
    dbias = tl.zeros((1, BLOCK_F), tl.float32)
    if HALVES == 2:
        bias_b = _load_bias(bias_ptr, F + cols, cols < F)
        dbias_b = tl.zeros((1, BLOCK_F), tl.float32)

    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)[:, None]
        at, mask = row * F + cols, (row < last) & (cols < F)
        h_at = 2 * row * F + cols if HALVES == 2 else at
        x = _load(h_ptr + h_at, mask) + bias
        if HALVES == 2:
            b = _load(h_ptr + h_at + F, mask) + bias_b
        # 0 in the rows past the last, which then add nothing to dbias
        du = _load(du_ptr + at, mask)

        if HALVES == 2:
            s = tl.sigmoid(x)
            dh = du * b * (s + x * s * (1 - s))
            db = du * (x * s)
            dbias_b += tl.sum(db, axis=0)[None, :]
            tl.store(dh_ptr + h_at + F, db, mask=mask)
        else:
            s = _share(x, EXACT)
            if EXACT:
                slope = x * tl.exp(-0.5 * x * x) * _DENSITY
            else:
                # from left to right: x * s * (1 - s) is 0 before x * x can be large
                slope = x * s * (1 - s) * (_SLOPE + x * x * (3 * _CUBIC * _SLOPE))
            dh = du * (s + slope)
        dbias += tl.sum(dh, axis=0)[None, :]
        tl.store(dh_ptr + h_at, dh, mask=mask)
        if u_ptr is not None:
            u = x * s * b if HALVES == 2 else x * s
            tl.store(u_ptr + at, u, mask=mask)

    # each program owns one row of partial sums: no atomics, so every run gives the same bits
    if dbias_ptr is not None:
        split = tl.program_id(1).to(tl.int64)
        at = split * 2 * F + cols if HALVES == 2 else split * F + cols
        tl.store(dbias_ptr + at, dbias, mask=cols < F)
        if HALVES == 2:
            tl.store(dbias_ptr + at + F, dbias_b, mask=cols < F)


# in plain torch: x is h + bias and may be written over


def _gelu_torch(x: Tensor, s: Tensor) -> Factors:
    return x, _sigmoid_2z_torch(x, torch.mul(x, x, out=s), s)


def _gelu_gradient_torch(x: Tensor, du: Tensor, dx: Tensor, x2: Tensor, s: Tensor) -> Factors:
    _sigmoid_2z_torch(x, torch.mul(x, x, out=x2), s)
    torch.ops.aten.sigmoid_backward.grad_input(x, s, grad_input=dx)  # x * s * (1 - s)
    dx.addcmul_(dx, x2, value=3 * CUBIC)
    torch.add(s, dx, alpha=SLOPE, out=dx).mul_(du)
    return x, s


def _sigmoid_2z_torch(x: Tensor, x2: Tensor, s: Tensor) -> Tensor:
    return torch.addcmul(x, x, x2, value=CUBIC, out=s).mul_(SLOPE).sigmoid_()


def _gelu_exact_torch(x: Tensor, s: Tensor) -> Factors:
    return x, torch.mul(x, math.sqrt(0.5), out=s).erf_().add_(1).mul_(0.5)


def _gelu_exact_gradient_torch(x: Tensor, du: Tensor, dx: Tensor, s: Tensor) -> Factors:
    torch.mul(x, x, out=dx).mul_(-0.5).exp_().mul_(x)
    _gelu_exact_torch(x, s)
    torch.add(s, dx, alpha=DENSITY, out=dx).mul_(du)
    return x, s


def _swiglu_torch(x: Tensor) -> Factors:
    a, b = x.chunk(2, dim=1)
    return torch.ops.aten.silu_(a), b


def _swiglu_gradient_torch(x: Tensor, du: Tensor, dx: Tensor) -> Factors:
    (a, b), (da, db) = x.chunk(2, dim=1), dx.chunk(2, dim=1)
    torch.mul(du, b, out=da)
    torch.ops.aten.silu_backward.grad_input(da, a, grad_input=da)
    torch.mul(du, torch.ops.aten.silu_(a), out=db)
    return a, b


class Activation(NamedTuple):
    """What one activation has for itself."""

    halves: int  # of a row of h: 2 where one gates the other
    forward: Share
    backward: Share
    forward_torch: Callable
    backward_torch: Callable
    exact: bool = False  # whether GELU is not its tanh form


GELU = Activation(1, Share(4, 88, 1), Share(2, 96, 2), _gelu_torch, _gelu_gradient_torch)
GELU_EXACT = Activation(
    1, Share(4, 96, 1), Share(2, 96, 1), _gelu_exact_torch, _gelu_exact_gradient_torch, exact=True
)
SWIGLU = Activation(2, Share(4, 64, 0), Share(2, 128, 0), _swiglu_torch, _swiglu_gradient_torch)
ACTIVATIONS = {"gelu": GELU, "gelu_exact": GELU_EXACT, "swiglu": SWIGLU}

# launchers: they write into tensors of their caller


def _forward_triton(activation, h, bias, u):
    grid, rows, options = column_launch(u, activation.forward)
    kind = activation.halves, activation.exact
    _fwd_kernel[grid](h, bias, u, *u.shape, rows, *kind, **options)


def _forward_torch(activation, h, bias, u):
    for h_rows, u_rows, x, *scratch in chunks(1 + activation.forward.scratch, h, u):
        _add_bias(h_rows, bias, x)
        torch.mul(*activation.forward_torch(x, *scratch), out=u_rows)


def _backward_triton(activation, h, du, bias, dh, u, dbias):
    grid, rows, options = column_launch(du, activation.backward)
    with sums.sums_of_all(len(du), rows, dbias) as (part,):
        kind = activation.halves, activation.exact
        _bwd_kernel[grid](h, du, bias, dh, u, part, *du.shape, rows, *kind, **options)


def _backward_scratch(activation, h, du, bias, dh, u, dbias):
    (_, programs), *_ = column_launch(du, activation.backward)
    return sums.scratch_of_all(programs, dbias)


def _backward_torch(activation, h, du, bias, dh, u, dbias):
    if dbias is not None:
        dbias.zero_()
    parts = chunks(2 + activation.backward.scratch, h, du, dh, u)
    for h_rows, du_rows, dh_rows, u_rows, x, grad, *scratch in parts:
        grad = same_dtype(dh_rows, grad)
        _add_bias(h_rows, bias, x)
        factors = activation.backward_torch(x, du_rows, grad, *scratch)
        if dbias is not None:
            dbias += grad.sum(0)
        if grad is not dh_rows:
            dh_rows.copy_(grad)
        # last, because u may be du
        if u_rows is not None:
            torch.mul(*factors, out=u_rows)


def chunks(scratch: int, h: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The same few rows of h and of each other tensor, then `scratch` tensors like those of h.

    The scratch is in at least float32 and the same for all chunks, so it stays in the cache.
    """
    rows = min(max(CHUNK * torch.get_num_threads() // h.shape[1], 1), h.shape[0])
    buffers = h.new_empty(scratch, rows, h.shape[1], dtype=checks.statistics_dtype(h))
    for start in range(0, h.shape[0], rows):
        views = [t if t is None else t[start : start + rows] for t in (h, *others)]
        yield *views, *buffers[:, : len(views[0])]


def same_dtype(out: Tensor, scratch: Tensor) -> Tensor:
    """Where to compute what goes into `out` in the dtype of `scratch`: in place where possible."""
    return out if out.dtype == scratch.dtype else scratch


def _add_bias(h: Tensor, bias: Tensor | None, x: Tensor) -> None:
    """x = h + bias in the dtype of x; never h itself, which its gradient may overwrite."""
    if bias is None or h.dtype != x.dtype:
        h = x.copy_(h)
    if bias is not None:
        torch.add(h, bias, out=x)


_FORWARD_OPS, BACKWARD_OPS = {}, {}
for _name, _activation in ACTIVATIONS.items():
    _FORWARD_OPS[_name] = register(
        f"{_name}_fwd(Tensor h, Tensor? bias, Tensor(a!) u) -> ()",
        triton=partial(_forward_triton, _activation),
        torch_=partial(_forward_torch, _activation),
    )
    # dh may be h itself and u may be du itself: each element is read before it is written. u is the
    # activation again; None of u and dbias, which is float32, is not computed
    BACKWARD_OPS[_name] = register(
        f"{_name}_bwd(Tensor h, Tensor du, Tensor? bias, Tensor(a!) dh, Tensor(b!)? u,"
        " Tensor(c!)? dbias) -> ()",
        triton=partial(_backward_triton, _activation),
        torch_=partial(_backward_torch, _activation),
        scratch=partial(_backward_scratch, _activation),
    )


# allocation and autograd


def activation_forward(name: str, h: Tensor, bias: Tensor | None) -> Tensor:
    """u (N, F) in the dtype of h, from contiguous h and bias of F columns, or of 2 F for swiglu."""
    u = h.new_empty(h.shape[0], h.shape[1] // ACTIVATIONS[name].halves)
    _FORWARD_OPS[name](h, bias, u)
    return u


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bias, name):
        ctx.save_for_backward(h, bias)
        ctx.name = name
        return activation_forward(name, h, bias)

    @staticmethod
    def backward(ctx, du):
        checks.refuse_double_backward(ctx.name)
        h, bias = ctx.saved_tensors
        dh, dbias = torch.empty_like(h), None
        if ctx.needs_input_grad[1]:
            dbias = torch.empty_like(bias, dtype=checks.statistics_dtype(h))
        BACKWARD_OPS[ctx.name](h, du.contiguous(), bias, dh, None, dbias)
        return dh, None if dbias is None else dbias.to(bias.dtype), None


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
    return _activate("gelu", h, bias, columns="F")


def gelu_exact(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add a projection's bias and take GELU as it is, by the error function.

    Args, result and errors are those of `gelu`.
    """
    return _activate("gelu_exact", h, bias, columns="F")


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
    return _activate("swiglu", h, bias, columns="2 F")


def _activate(name: str, h: Tensor, bias: Tensor | None, *, columns: str) -> Tensor:
    checks.check_floats(h=h, bias=bias)
    halves = ACTIVATIONS[name].halves
    if h.dim() == 0 or h.shape[-1] == 0 or h.shape[-1] % halves:
        raise ValueError(f"h must be (..., {columns}) with F at least 1, got {tuple(h.shape)}")
    width = h.shape[-1]
    checks.check_shape((width,), f"({columns},)", bias=bias)
    bias = None if bias is None else bias.contiguous()
    u = _Activate.apply(h.contiguous().view(-1, width), bias, name)
    return u.view(*h.shape[:-1], width // halves)
