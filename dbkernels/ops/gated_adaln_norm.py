"""From one branch to the next: gate, residual, norm and modulation, in one pass.

    x1 = x + gate[b] * h
    y  = (1 + scale[b]) * x1_hat + shift[b],    x1_hat of `_norm`

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. Backward, with dx1 of the
residual stream, dx_norm of `_norm` for g = (1 + scale) * dy, and x1 rebuilt from x and h:

    dx     = dx1 + dx_norm
    dh     = gate * dx
    dgate  = sum_t dx * h
    dscale = sum_t dy * x1_hat
    dshift = sum_t dy
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._norm import (
    Modulation,
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
FORWARD_REGISTERS = {(4, 1): 48, (4, 2): 72, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 192}
BACKWARD_REGISTERS = {(4, 1): 96, (4, 2): 96, (4, 3): 128, (8, 1): 128, (8, 2): 64, (8, 3): 255}

# kernels


@triton.jit(do_not_specialize=SHARED_OUT)
def _fwd_kernel(
    x_ptr, h_ptr, gate_ptr, scale_ptr, shift_ptr,  # (B*T, D) twice, (B, D) three times
    x1_ptr, y_ptr, stats_ptr,                      # (B*T, D) twice, (B*T, 2)
    rows, T, D, stride_mod, rows_per_program, eps,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        gate = load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        weight = load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        shift = load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)

        begin, end = rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            h = load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)

            x1 = mul_add_rows(gate, h, x, PIECES)
            x1_hat, mean, rstd = normalise_row(x1, D, eps, CENTRED, BLOCK_D, PIECES)
            y = mul_add_rows(weight, x1_hat, shift, PIECES)

            if x1_ptr is not None:
                store_row(x1_ptr, row * D, mask, x1, D, BLOCK_D, PIECES)
            store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)
            store_stats(stats_ptr, row, mask, mean, rstd)


@triton.jit(do_not_specialize=SHARED_OUT)
def _bwd_kernel(
    dy_ptr, dx1_ptr, x_ptr, h_ptr, gate_ptr, scale_ptr, shift_ptr, stats_ptr,
    dx_ptr, dh_ptr, y_ptr, dgate_ptr, dscale_ptr, dshift_ptr,  # sums are (B or segments, D)
    rows, T, D, stride_mod, stride_sums, samples_are_shared, rows_per_program,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        gate = load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        weight = load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        dgate = zero_row(BLOCK_T, BLOCK_D, PIECES)
        dscale = zero_row(BLOCK_T, BLOCK_D, PIECES)
        dshift = zero_row(BLOCK_T, BLOCK_D, PIECES)

        begin, end = rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            h = load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)
            dy = load_row(dy_ptr, row * D, mask, D, BLOCK_D, PIECES)
            if dx1_ptr is not None:
                dx1 = load_row(dx1_ptr, row * D, mask, D, BLOCK_D, PIECES)
            mean, rstd = load_stats(stats_ptr, row, mask)

            x1_hat = standardise_row(mul_add_rows(gate, h, x, PIECES), mean, rstd, PIECES)
            dscale = mul_add_rows(dy, x1_hat, dscale, PIECES)
            dshift = add_rows(dy, dshift, PIECES)
            if y_ptr is not None:
                shift = load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
                y = mul_add_rows(weight, x1_hat, shift, PIECES)
                store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)

            # dy is 0 past D, so every mean and sum sees real lanes only
            g = mul_rows(weight, dy, PIECES)
            dx = normalise_row_backward(g, x1_hat, rstd, D, CENTRED, PIECES)
            if dx1_ptr is not None:
                dx = add_rows(dx, dx1, PIECES)
            # from L1 this time: held until here, h would cost a program to a processor
            h = load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)
            dgate = mul_add_rows(dx, h, dgate, PIECES)
            store_row(dx_ptr, row * D, mask, dx, D, BLOCK_D, PIECES)
            store_row(dh_ptr, row * D, mask, mul_rows(gate, dx, PIECES), D, BLOCK_D, PIECES)

        out = segment(batch, samples_are_shared) * stride_sums
        store_vector(dgate_ptr, out, sum_over_rows(dgate, PIECES), D, BLOCK_D, PIECES)
        store_vector(dscale_ptr, out, sum_over_rows(dscale, PIECES), D, BLOCK_D, PIECES)
        store_vector(dshift_ptr, out, sum_over_rows(dshift, PIECES), D, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def _forward_triton(x, h, gate, scale, shift, x1, y, stats, eps, centred):
    B, T, D = x.shape
    launch = row_launch(x, FORWARD_REGISTERS)
    _fwd_kernel[(launch.programs,)](
        x, h, gate, scale, shift, x1, y, stats,
        B * T, T, D, scale.stride(0), launch.rows, eps, centred, **launch.options,
    )  # fmt: skip


def _forward_torch(x, h, gate, scale, shift, x1, y, stats, eps, centred):
    total = torch.addcmul(x.to(stats.dtype), gate[:, None], h)
    x1_hat, statistics = normalise(total, eps, centred)
    if x1 is not None:
        x1.copy_(total)
    stats.copy_(statistics)
    torch.addcmul(shift[:, None], x1_hat, 1 + scale[:, None].to(x1_hat.dtype), out=y)


def _backward_triton(
    dy, dx1, x, h, gate, scale, shift, stats, dx, dh, y, dgate, dscale, dshift, centred
):
    B, T, D = x.shape
    launch = row_launch(x, BACKWARD_REGISTERS)
    with sums_of_samples(launch, T, dgate, dscale, dshift) as sums:
        _bwd_kernel[(launch.programs,)](
            dy, dx1, x, h, gate, scale, shift, stats, dx, dh, y, *sums,
            B * T, T, D, scale.stride(0), sums[0].stride(0), launch.samples_are_shared, launch.rows,
            centred, **launch.options,
        )  # fmt: skip


def _backward_torch(
    dy, dx1, x, h, gate, scale, shift, stats, dx, dh, y, dgate, dscale, dshift, centred
):
    h, dy = h.to(stats.dtype), dy.to(stats.dtype)
    x1 = torch.addcmul(x.to(stats.dtype), gate[:, None], h)
    x1_hat = standardise(x1, stats)
    dscale.copy_((dy * x1_hat).sum(1))
    dshift.copy_(dy.sum(1))
    weight = 1 + scale[:, None].to(stats.dtype)
    grad = normalise_backward(weight * dy, x1, x1_hat, stats, centred)
    if y is not None:
        torch.addcmul(shift[:, None], x1_hat, weight, out=y)
    if dx1 is not None:
        grad += dx1
    dx.copy_(grad)
    dgate.copy_((grad * h).sum(1))
    torch.mul(grad, gate[:, None], out=dh)


_forward_op = register(
    "gated_adaln_norm_fwd(Tensor x, Tensor h, Tensor gate, Tensor scale, Tensor shift,"
    " Tensor(a!)? x1, Tensor(b!) y, Tensor(c!) stats, float eps, bool centred) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_backward_op = register(
    "gated_adaln_norm_bwd(Tensor dy, Tensor? dx1, Tensor x, Tensor h, Tensor gate, Tensor scale,"
    " Tensor shift, Tensor stats, Tensor(a!) dx, Tensor(b!) dh, Tensor(c!)? y, Tensor(d!) dgate,"
    " Tensor(e!) dscale, Tensor(f!) dshift, bool centred) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def gated_adaln_norm_forward(
    x: Tensor, h: Tensor, modulation: Modulation, options: NormOptions, *, x1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and its statistics (B, T, 2); writes x1 where it is given."""
    y = torch.empty_like(x, dtype=options.dtype)
    stats = torch.empty((*x.shape[:2], 2), dtype=statistics_dtype(x), device=x.device)
    if x.numel():
        _forward_op(x, h, *modulation, x1, y, stats, options.eps, options.centred)
    return y, stats


def gated_adaln_norm_backward(
    dy: Tensor,
    dx1: Tensor | None,
    x: Tensor,
    h: Tensor,
    modulation: Modulation,
    stats: Tensor,
    options: NormOptions,
    *,
    dh: Tensor,
    y: Tensor | None,
    dmodulation: Modulation,
) -> Tensor:
    """dx; writes dh, dmodulation, and y again where it is given.

    dh may be h itself and y may be dy itself: each row is read before it is written.
    """
    dx = torch.empty_like(x)
    if x.numel():
        _backward_op(dy, dx1, x, h, *modulation, stats, dx, dh, y, *dmodulation, options.centred)
    else:
        for gradient in dmodulation:
            gradient.zero_()
    return dx


class _GatedAdaLNNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, gate, scale, shift, options):
        modulation, x1 = Modulation(gate, scale, shift), torch.empty_like(x)
        y, stats = gated_adaln_norm_forward(x, h, modulation, options, x1=x1)
        ctx.save_for_backward(x, h, *modulation, stats)
        ctx.options = options
        return x1, y

    @staticmethod
    def backward(ctx, dx1, dy):
        checks.refuse_double_backward("gated_adaln_norm")
        x, h, *modulation, stats = ctx.saved_tensors
        dh, dmodulation = torch.empty_like(h), Modulation(*map(torch.empty_like, modulation))
        dx = gated_adaln_norm_backward(
            dy.contiguous(), dx1.contiguous(), x, h, Modulation(*modulation), stats, ctx.options,
            dh=dh, y=None, dmodulation=dmodulation,
        )  # fmt: skip
        return dx, dh, *dmodulation, None


# public


def gated_adaln_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a branch's gated output to the residual stream, normalise and modulate for the next.

    Args:
        x:      (B, T, D)  residual stream: float32, bfloat16 or float16
        h:      (B, T, D)  branch output, of one of these dtypes
        gate:   (B, D) per sample or (B, T, D) per token; 0 closes the branch
        scale:  as gate; 0 leaves the normalised token as it is. Affine norms: `fold_affine`
        shift:  as gate; shape, strides and dtype of all three are equal
        norm:   "layer", or "rms", which does not subtract the mean
        eps:    added to the variance, so in units of x**2
    Returns:
        The residual stream x1 (B, T, D) in the dtype of x, and y (B, T, D) in that of h.
    Raises:
        ValueError: a shape, stride, dtype or device disagrees, D > MAX_D, or norm is unknown.
        RuntimeError: the gradient is differentiated.
    """
    options = NormOptions(eps, checks.check_norm(norm), h.dtype)
    checks.check_floats(x=x, h=h, gate=gate, scale=scale, shift=shift)
    checks.check_tokens(x=x, h=h)
    checks.check_modulation(x, gate=gate, scale=scale, shift=shift)
    samples, branch = checks.as_samples(x, gate), checks.as_samples(h, gate)
    modulation = map(checks.as_rows, (gate, scale, shift))
    x1, y = _GatedAdaLNNorm.apply(samples, branch, *modulation, options)
    return x1.view(x.shape), y.view(x.shape)
