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

from dbkernels.ops.backend import checks, sums, tile
from dbkernels.ops.backend.register import register

# of a thread, by RowTile.shape: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = {(4, 1): 40, (4, 2): 40, (4, 3): 48, (8, 1): 64, (8, 2): 64, (8, 3): 128}
BACKWARD_REGISTERS = {(4, 1): 48, (4, 2): 56, (4, 3): 72, (8, 1): 64, (8, 2): 64, (8, 3): 128}

# kernels


@triton.jit(do_not_specialize=tile.SHARED_OUT)
def _fwd_kernel(
    x_ptr, h_ptr, gate_ptr,  # (B*T, D) twice, (B, D)
    y_ptr,                   # (B*T, D)
    rows, T, D, stride_mod, rows_per_program,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = tile.rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        gate = tile.load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)

        begin, end = tile.rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = tile.load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            h = tile.load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)

            y = tile.mul_add_rows(gate, h, x, PIECES)

            tile.store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)


@triton.jit(do_not_specialize=tile.SHARED_OUT)
def _bwd_kernel(
    dy_ptr, h_ptr, gate_ptr,  # (B*T, D) twice, (B, D)
    dh_ptr, dgate_ptr,        # (B*T, D), (B or segments, D)
    rows, T, D, stride_mod, stride_sums, samples_are_shared, rows_per_program,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = tile.rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        gate = tile.load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        dgate = tile.zeros_like(gate)

        begin, end = tile.rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            dy = tile.load_row(dy_ptr, row * D, mask, D, BLOCK_D, PIECES)
            h = tile.load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)

            dgate = tile.mul_add_rows(dy, h, dgate, PIECES)
            dh = tile.mul_rows(gate, dy, PIECES)

            tile.store_row(dh_ptr, row * D, mask, dh, D, BLOCK_D, PIECES)

        out = sums.segment(batch, samples_are_shared) * stride_sums
        tile.store_sum(dgate_ptr, out, dgate, D, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def _forward_triton(x, h, gate, y):
    B, T, D = x.shape
    launch = tile.row_launch(x, FORWARD_REGISTERS)
    _fwd_kernel[(launch.programs,)](
        x, h, gate, y, B * T, T, D, gate.stride(0), launch.rows, **launch.options
    )


def _forward_torch(x, h, gate, y):
    torch.addcmul(x, gate[:, None], h, out=y)


def _backward_triton(dy, h, gate, dh, dgate):
    B, T, D = dy.shape
    launch = tile.row_launch(dy, BACKWARD_REGISTERS)
    with sums.sums_of_samples(launch, T, dgate) as (part,):
        _bwd_kernel[(launch.programs,)](
            dy, h, gate, dh, part,
            B * T, T, D, gate.stride(0), part.stride(0), launch.samples_are_shared, launch.rows,
            **launch.options,
        )  # fmt: skip


def _backward_torch(dy, h, gate, dh, dgate):
    dgate.copy_((dy.to(checks.statistics_dtype(dy)) * h).sum(1))
    torch.mul(dy, gate[:, None], out=dh)


# y may be x itself, and dh may be h
gated_residual_forward = register(
    "gated_residual_fwd(Tensor x, Tensor h, Tensor gate, Tensor(a!) y) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
gated_residual_backward = register(
    "gated_residual_bwd(Tensor dy, Tensor h, Tensor gate, Tensor(a!) dh, Tensor(b!) dgate) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
    scratch=lambda dy, *_: sums.scratch_of_samples(dy, BACKWARD_REGISTERS, 1),
)


# autograd


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, gate):
        y = torch.empty_like(x)
        gated_residual_forward(x, h, gate, y=y)
        ctx.save_for_backward(h, gate)
        return y

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("gated_residual")
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
    rows = checks.rows_of_samples({"x": x, "h": h}, {"gate": gate})
    return checks.as_tokens(_GatedResidual.apply(*rows), x)
