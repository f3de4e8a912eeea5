"""Layer norm or RMS norm and its modulation by a condition, in one pass over x.

    y[b, t] = (1 + scale[b]) * x_hat[b, t] + shift[b],    x_hat of `_norm`

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero.

Backward, with dx of `_norm` for g = (1 + scale) * dy:

    dscale = sum_t dy * x_hat
    dshift = sum_t dy
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._norm import (
    NormOptions,
    load_stats,
    load_weight,
    normalise,
    normalise_backward,
    normalise_row,
    normalise_row_backward,
    standardise,
    standardise_row,
    statistics_dtype,
    store_stats,
)
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.sums import segment, sums_of_samples
from dbkernels.ops.backend.tile import (
    SHARED_OUT,
    add_rows,
    load_row,
    load_vector,
    mul_add_rows,
    mul_rows,
    row_launch,
    rows_of_program,
    rows_of_sample,
    store_row,
    store_vector,
    sum_over_rows,
    zero_row,
)

# of a thread, by RowTile.shape: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = {(4, 1): 40, (4, 2): 48, (4, 3): 64, (8, 1): 64, (8, 2): 64, (8, 3): 128}
BACKWARD_REGISTERS = {(4, 1): 72, (4, 2): 80, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 255}

# kernels


@triton.jit(do_not_specialize=SHARED_OUT)
def _fwd_kernel(
    x_ptr, scale_ptr, shift_ptr,  # (B*T, D), (B, D), (B, D)
    y_ptr, stats_ptr,             # (B*T, D), (B*T, 2)
    rows, T, D, stride_mod, rows_per_program, eps,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        weight = load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        shift = load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)

        begin, end = rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)

            x_hat, mean, rstd = normalise_row(x, D, eps, CENTRED, BLOCK_D, PIECES)
            y = mul_add_rows(weight, x_hat, shift, PIECES)

            store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)
            store_stats(stats_ptr, row, mask, mean, rstd)


@triton.jit(do_not_specialize=SHARED_OUT)
def _bwd_kernel(
    dy_ptr, dres_ptr, x_ptr, scale_ptr, shift_ptr, stats_ptr,
    dx_ptr, y_ptr, dscale_ptr, dshift_ptr,  # (B*T, D) twice, (B or segments, D) twice
    rows, T, D, stride_mod, stride_sums, samples_are_shared, rows_per_program,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        weight = load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        dscale = zero_row(BLOCK_T, BLOCK_D, PIECES)
        dshift = zero_row(BLOCK_T, BLOCK_D, PIECES)

        begin, end = rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            dy = load_row(dy_ptr, row * D, mask, D, BLOCK_D, PIECES)
            if dres_ptr is not None:
                dres = load_row(dres_ptr, row * D, mask, D, BLOCK_D, PIECES)
            mean, rstd = load_stats(stats_ptr, row, mask)

            x_hat = standardise_row(x, mean, rstd, PIECES)
            dscale = mul_add_rows(dy, x_hat, dscale, PIECES)
            dshift = add_rows(dy, dshift, PIECES)
            if y_ptr is not None:
                shift = load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
                y = mul_add_rows(weight, x_hat, shift, PIECES)
                store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)

            # dy is 0 past D, so every mean and sum sees real lanes only
            g = mul_rows(weight, dy, PIECES)
            dx = normalise_row_backward(g, x_hat, rstd, D, CENTRED, PIECES)
            if dres_ptr is not None:
                dx = add_rows(dx, dres, PIECES)
            store_row(dx_ptr, row * D, mask, dx, D, BLOCK_D, PIECES)

        out = segment(batch, samples_are_shared) * stride_sums
        store_vector(dscale_ptr, out, sum_over_rows(dscale, PIECES), D, BLOCK_D, PIECES)
        store_vector(dshift_ptr, out, sum_over_rows(dshift, PIECES), D, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def _forward_triton(x, scale, shift, y, stats, eps, centred):
    B, T, D = x.shape
    launch = row_launch(x, FORWARD_REGISTERS)
    _fwd_kernel[(launch.programs,)](
        x, scale, shift, y, stats,
        B * T, T, D, scale.stride(0), launch.rows, eps, centred, **launch.options,
    )  # fmt: skip


def _forward_torch(x, scale, shift, y, stats, eps, centred):
    x_hat, statistics = normalise(x, eps, centred)
    stats.copy_(statistics)
    torch.addcmul(shift[:, None], x_hat, 1 + scale[:, None].to(x_hat.dtype), out=y)


def _backward_triton(dy, dres, x, scale, shift, stats, dx, y, dscale, dshift, centred):
    B, T, D = x.shape
    launch = row_launch(x, BACKWARD_REGISTERS)
    with sums_of_samples(launch, T, dscale, dshift) as sums:
        _bwd_kernel[(launch.programs,)](
            dy, dres, x, scale, shift, stats, dx, y, *sums,
            B * T, T, D, scale.stride(0), sums[0].stride(0), launch.samples_are_shared, launch.rows,
            centred, **launch.options,
        )  # fmt: skip


def _backward_torch(dy, dres, x, scale, shift, stats, dx, y, dscale, dshift, centred):
    x, dy = x.to(stats.dtype), dy.to(stats.dtype)
    x_hat = standardise(x, stats)
    dscale.copy_((dy * x_hat).sum(1))
    dshift.copy_(dy.sum(1))
    weight = 1 + scale[:, None].to(stats.dtype)
    grad = normalise_backward(weight * dy, x, x_hat, stats, centred)
    dx.copy_(grad if dres is None else grad.add_(dres))
    if y is not None:
        torch.addcmul(shift[:, None], x_hat, weight, out=y)


_forward_op = register(
    "adaln_norm_fwd(Tensor x, Tensor scale, Tensor shift, Tensor(a!) y, Tensor(b!) stats,"
    " float eps, bool centred) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_backward_op = register(
    "adaln_norm_bwd(Tensor dy, Tensor? dres, Tensor x, Tensor scale, Tensor shift, Tensor stats,"
    " Tensor(a!) dx, Tensor(b!)? y, Tensor(c!) dscale, Tensor(d!) dshift, bool centred) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def adaln_norm_forward(
    x: Tensor, scale: Tensor, shift: Tensor, options: NormOptions
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and its statistics (B, T, 2), from contiguous x and (B, D) modulation."""
    y = torch.empty_like(x, dtype=options.dtype)
    stats = torch.empty((*x.shape[:2], 2), dtype=statistics_dtype(x), device=x.device)
    if x.numel():
        _forward_op(x, scale, shift, y, stats, options.eps, options.centred)
    return y, stats


def adaln_norm_backward(
    dy: Tensor,
    dres: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    options: NormOptions,
    *,
    y: Tensor | None,
    dscale: Tensor,
    dshift: Tensor,
) -> Tensor:
    """dx, plus dres where there is one; writes dscale and dshift, and y again where it is given.

    y may be dy itself: each row is read before it is written.
    """
    dx = torch.empty_like(x)
    if x.numel():
        _backward_op(dy, dres, x, scale, shift, stats, dx, y, dscale, dshift, options.centred)
    else:
        dscale.zero_(), dshift.zero_()
    return dx


class _AdaLNNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, options):
        y, stats = adaln_norm_forward(x, scale, shift, options)
        ctx.save_for_backward(x, scale, shift, stats)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("adaln_norm")
        x, scale, shift, stats = ctx.saved_tensors
        dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
        dx = adaln_norm_backward(
            dy.contiguous(), None, x, scale, shift, stats, ctx.options,
            y=None, dscale=dscale, dshift=dshift,
        )  # fmt: skip
        return dx, dscale, dshift, None


# public


def adaln_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise each token over D, then modulate it by its condition.

    Args:
        x:      (B, T, D)  float32, bfloat16 or float16
        scale:  (B, D) per sample or (B, T, D) per token; 0 leaves the normalised token as it is.
                An affine norm's own weight and bias go in by `fold_affine`
        shift:  shape, strides and dtype of scale
        norm:   "layer", or "rms", which does not subtract the mean
        eps:    added to the variance, so in units of x**2
        dtype:  of the result, one that x may have; None is that of x
    Returns:
        (B, T, D). Statistics and sums are float32 inside.
    Raises:
        ValueError: a shape, stride, dtype or device disagrees, D > MAX_D, or norm or dtype is not
            among those named.
        RuntimeError: the gradient is differentiated.
    """
    options = NormOptions(eps, checks.check_norm(norm), checks.result_dtype(dtype, x))
    checks.check_floats(x=x, scale=scale, shift=shift)
    checks.check_tokens(x=x)
    checks.check_modulation(x, scale=scale, shift=shift)
    samples = checks.as_samples(x, scale)
    y = _AdaLNNorm.apply(samples, checks.as_rows(scale), checks.as_rows(shift), options)
    return y.view(x.shape)
