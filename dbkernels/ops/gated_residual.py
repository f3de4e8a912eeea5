"""The way out of a branch: the residual stream plus its gated output.

    y[b, t] = x[b, t] + gate[b] * h[b, t]

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. Backward:

    dx    = dy
    dh    = gate * dy
    dgate = sum_t dy * h
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops import _door
from dbkernels.ops._norm import statistics_dtype
from dbkernels.ops._register import register
from dbkernels.ops._tile import (
    load_row,
    load_vector,
    mul_add_rows,
    mul_rows,
    partial_sums,
    row_launch,
    store_row,
    store_vector,
    sum_over_rows,
    zero_row,
)

FORWARD_PROGRAMS = 16  # of one processor: enough loads in flight to hide their latency
BACKWARD_PROGRAMS = 8  # each holds sums of D columns, and writes them once

# kernels


@triton.jit
def _fwd_kernel(
    x_ptr, h_ptr, gate_ptr,  # (B*T, D) twice, (B, D)
    y_ptr,                   # (B*T, D)
    T, D, stride_mod, rows_per_split,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    gate = load_vector(gate_ptr, batch * stride_mod, D, BLOCK_D, PIECES)

    last = tl.minimum((split + 1) * rows_per_split, T)
    for start in range(split * rows_per_split, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        row, mask = batch * T + t, t < last
        x = load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
        h = load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)

        y = mul_add_rows(gate, h, x, PIECES)

        store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)


@triton.jit
def _bwd_kernel(
    dy_ptr, h_ptr, gate_ptr,  # (B*T, D) twice, (B, D)
    dh_ptr, dgate_ptr,        # (B*T, D), (B*splits, D)
    T, D, stride_mod, stride_sums, rows_per_split,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    gate = load_vector(gate_ptr, batch * stride_mod, D, BLOCK_D, PIECES)
    dgate = zero_row(BLOCK_T, BLOCK_D, PIECES)

    last = tl.minimum((split + 1) * rows_per_split, T)
    for start in range(split * rows_per_split, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        row, mask = batch * T + t, t < last
        dy = load_row(dy_ptr, row * D, mask, D, BLOCK_D, PIECES)
        h = load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)

        dgate = mul_add_rows(dy, h, dgate, PIECES)
        dh = mul_rows(gate, dy, PIECES)

        store_row(dh_ptr, row * D, mask, dh, D, BLOCK_D, PIECES)

    # each program owns one row of partial sums: no atomics, so every run gives the same bits
    out = (batch * tl.num_programs(1) + split) * stride_sums
    store_vector(dgate_ptr, out, sum_over_rows(dgate, PIECES), D, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def _forward_triton(x, h, gate, y):
    _, T, D = x.shape
    grid, rows, tile = row_launch(x, FORWARD_PROGRAMS)
    _fwd_kernel[grid](x, h, gate, y, T, D, gate.stride(0), rows, **tile)


def _forward_torch(x, h, gate, y):
    torch.addcmul(x, gate[:, None], h, out=y)


def _backward_triton(dy, h, gate, dh, dgate):
    _, T, D = dy.shape
    grid, rows, tile = row_launch(dy, BACKWARD_PROGRAMS)
    with partial_sums(grid[1], dgate) as (sums,):
        _bwd_kernel[grid](
            dy, h, gate, dh, sums, T, D, gate.stride(0), sums.stride(-2), rows, **tile
        )


def _backward_torch(dy, h, gate, dh, dgate):
    dgate.copy_((dy.to(statistics_dtype(dy)) * h).sum(1))
    torch.mul(dy, gate[:, None], out=dh)


_forward_op = register(
    "gated_residual_fwd(Tensor x, Tensor h, Tensor gate, Tensor(a!) y) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_backward_op = register(
    "gated_residual_bwd(Tensor dy, Tensor h, Tensor gate, Tensor(a!) dh, Tensor(b!) dgate) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def gated_residual_forward(x: Tensor, h: Tensor, gate: Tensor, *, y: Tensor) -> None:
    """Writes y (B, T, D), which may be x itself, from contiguous x and h and a gate (B, D)."""
    if x.numel():
        _forward_op(x, h, gate, y)


def gated_residual_backward(
    dy: Tensor, h: Tensor, gate: Tensor, *, dh: Tensor, dgate: Tensor
) -> None:
    """Writes dh, which may be h itself, and dgate (B, D)."""
    if dy.numel():
        _backward_op(dy, h, gate, dh, dgate)
    else:
        dgate.zero_()


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, gate):
        y = torch.empty_like(x)
        gated_residual_forward(x, h, gate, y=y)
        ctx.save_for_backward(h, gate)
        return y

    @staticmethod
    def backward(ctx, dy):
        _door.refuse_double_backward("gated_residual")
        h, gate = ctx.saved_tensors
        dh, dgate = torch.empty_like(h), torch.empty_like(gate)
        gated_residual_backward(dy.contiguous(), h, gate, dh=dh, dgate=dgate)
        return dy, dh, dgate


# public


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """Add a branch's output to the residual stream, times a gate.

    Args:
        x:     (B, T, D)  residual stream: float32, bfloat16 or float16
        h:     (B, T, D)  output of the branch; its dtype may be another one of these
        gate:  (B, D) per sample or (B, T, D) per token; 0 closes the branch
    Returns:
        (B, T, D), dtype of x.
    Raises:
        ValueError: a shape, stride, dtype or device disagrees, or D > MAX_D.
        RuntimeError: the gradient is differentiated.
    """
    _door.check_floats(x=x, h=h, gate=gate)
    _door.check_tokens(x=x, h=h)
    _door.check_modulation(x, gate=gate)
    samples, branch = _door.as_samples(x, gate), _door.as_samples(h, gate)
    return _GatedResidual.apply(samples, branch, _door.as_rows(gate)).view(x.shape)
