"""Layer norm or RMS norm and its modulation by a condition, in one pass over x.

    y[b, t] = (1 + scale[b]) * x_hat[b, t] + shift[b]
    x_hat   = (x - mean) * rstd,    rstd = 1 / sqrt(mean((x - mean)**2) + eps)

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. RMS norm has a mean of 0.

Backward, with g = (1 + scale) * dy and every mean over D:

    dx     = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),    without mean(g) for RMS norm
    dscale = sum_t dy * x_hat
    dshift = sum_t dy

No kernel knows whether a norm is affine: its weight and bias are folded into the modulation, over
samples and not over tokens, by

    (1 + scale) * (weight * x_hat + bias) + shift = (1 + scale') * x_hat + shift'
    scale' = (1 + scale) * weight - 1
    shift' = (1 + scale) * bias + shift

The kernels serve `gated_adaln_norm` too: where there is an h they first add a branch, gate * h.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks, sums, tile
from dbkernels.ops.backend.register import register

# of a thread, by RowTile.shape: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = {(4, 1): 40, (4, 2): 48, (4, 3): 64, (8, 1): 64, (8, 2): 64, (8, 3): 128}
BACKWARD_REGISTERS = {(4, 1): 72, (4, 2): 80, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 255}


class NormOptions(NamedTuple):
    """What a conditioned norm is told beside its tensors."""

    eps: float
    centred: bool
    dtype: torch.dtype


# kernels


@triton.jit
def _normalise_row(x, D, eps, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """x_hat, mean and rstd of rows that hold 0 past D; x_hat holds 0 there too."""
    mean = tile.mean_row(x, D, PIECES) if CENTRED else tl.zeros((x[0].shape[0], 1), tl.float32)
    x_centred = ()
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        # lanes past D hold -mean here, which would count towards the variance
        x_centred += (tl.where(cols < D, x[piece] - mean, 0.0),)
    variance = tile.mean_row(tile.mul_rows(x_centred, x_centred, PIECES), D, PIECES)
    rstd = reciprocal_root(variance, eps)
    return _standardise_row(x_centred, 0.0, rstd), mean, rstd


@triton.jit
def reciprocal_root(variance, eps):
    """rstd; NaN where the variance overflowed, or rows that large would all have a norm of 0."""
    return tl.where(variance == float("inf"), float("nan"), 1 / tl.sqrt(variance + eps))


@triton.jit
def _standardise_row(x, mean, rstd):
    return [(piece - mean) * rstd for piece in x]


@triton.jit
def _normalise_row_backward(g, x_hat, rstd, D, CENTRED: tl.constexpr, PIECES: tl.constexpr):
    """dx of rows; g must hold 0 past D."""
    g_mean = tile.mean_row(g, D, PIECES) if CENTRED else 0.0
    gx_mean = tile.mean_row(tile.mul_rows(g, x_hat, PIECES), D, PIECES)
    dx = ()
    for piece in tl.static_range(PIECES):
        dx += (rstd * (g[piece] - g_mean - x_hat[piece] * gx_mean),)
    return dx


@triton.jit
def _load_weight(
    scale_ptr, start, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """1 + scale, for all rows of a tile."""
    scale = tile.load_vector(scale_ptr, start, D, BLOCK_T, BLOCK_D, PIECES)
    return [1 + piece for piece in scale]


@triton.jit(do_not_specialize=tile.SHARED_OUT)
def _fwd_kernel(
    x_ptr, h_ptr, gate_ptr, scale_ptr, shift_ptr,  # (B*T, D) twice, (B, D) three times
    x1_ptr, y_ptr, stats_ptr,                      # (B*T, D) twice, (B*T, 2)
    rows, T, D, stride_mod, rows_per_program, eps,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = tile.rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        if h_ptr is not None:
            gate = tile.load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        weight = _load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        shift = tile.load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)

        begin, end = tile.rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = tile.load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            if h_ptr is not None:
                h = tile.load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)
                x = tile.mul_add_rows(gate, h, x, PIECES)

            x_hat, mean, rstd = _normalise_row(x, D, eps, CENTRED, BLOCK_D, PIECES)
            y = tile.mul_add_rows(weight, x_hat, shift, PIECES)

            if x1_ptr is not None:
                tile.store_row(x1_ptr, row * D, mask, x, D, BLOCK_D, PIECES)
            tile.store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)
            tl.store(stats_ptr + 2 * row, mean, mask=mask)
            tl.store(stats_ptr + 2 * row + 1, rstd, mask=mask)


@triton.jit(do_not_specialize=tile.SHARED_OUT)
def _bwd_kernel(
    dy_ptr, dres_ptr, x_ptr, h_ptr, gate_ptr, scale_ptr, shift_ptr, stats_ptr,
    dx_ptr, dh_ptr, y_ptr, dgate_ptr, dscale_ptr, dshift_ptr,  # sums are (B or segments, D)
    rows, T, D, stride_mod, stride_sums, samples_are_shared, rows_per_program,
    CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, last = tile.rows_of_program(rows, rows_per_program)
    for batch in range(first // T, tl.cdiv(last, T)):
        if h_ptr is not None:
            gate = tile.load_vector(gate_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
            dgate = tile.zeros_like(gate)
        weight = _load_weight(scale_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
        dscale, dshift = tile.zeros_like(weight), tile.zeros_like(weight)

        begin, end = tile.rows_of_sample(batch, first, last, T)
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)[:, None]
            row, mask = batch * T + t, t < end
            x = tile.load_row(x_ptr, row * D, mask, D, BLOCK_D, PIECES)
            if h_ptr is not None:
                h = tile.load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)
            dy = tile.load_row(dy_ptr, row * D, mask, D, BLOCK_D, PIECES)
            if dres_ptr is not None:
                dres = tile.load_row(dres_ptr, row * D, mask, D, BLOCK_D, PIECES)
            mean = tl.load(stats_ptr + 2 * row, mask=mask, other=0.0)
            rstd = tl.load(stats_ptr + 2 * row + 1, mask=mask, other=0.0)

            if h_ptr is not None:
                x = tile.mul_add_rows(gate, h, x, PIECES)
            x_hat = _standardise_row(x, mean, rstd)
            dscale = tile.mul_add_rows(dy, x_hat, dscale, PIECES)
            dshift = tile.add_rows(dy, dshift, PIECES)
            if y_ptr is not None:
                shift = tile.load_vector(shift_ptr, batch * stride_mod, D, BLOCK_T, BLOCK_D, PIECES)
                y = tile.mul_add_rows(weight, x_hat, shift, PIECES)
                tile.store_row(y_ptr, row * D, mask, y, D, BLOCK_D, PIECES)

            # dy is 0 past D, so every mean and sum sees real lanes only
            g = tile.mul_rows(weight, dy, PIECES)
            dx = _normalise_row_backward(g, x_hat, rstd, D, CENTRED, PIECES)
            if dres_ptr is not None:
                dx = tile.add_rows(dx, dres, PIECES)
            if h_ptr is not None:
                # from L1 this time: in registers until here, h would cost a program to a processor
                h = tile.load_row(h_ptr, row * D, mask, D, BLOCK_D, PIECES)
                dgate = tile.mul_add_rows(dx, h, dgate, PIECES)
                dh = tile.mul_rows(gate, dx, PIECES)
                tile.store_row(dh_ptr, row * D, mask, dh, D, BLOCK_D, PIECES)
            tile.store_row(dx_ptr, row * D, mask, dx, D, BLOCK_D, PIECES)

        out = sums.segment(batch, samples_are_shared) * stride_sums
        if h_ptr is not None:
            tile.store_sum(dgate_ptr, out, dgate, D, BLOCK_D, PIECES)
        tile.store_sum(dscale_ptr, out, dscale, D, BLOCK_D, PIECES)
        tile.store_sum(dshift_ptr, out, dshift, D, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def launch_forward(registers, branch, x, scale, shift, y, stats, eps, centred):
    """The branch has h, its gate and x1, or None of each."""
    (h, gate, x1), (B, T, D) = branch, x.shape
    launch = tile.row_launch(x, registers)
    _fwd_kernel[(launch.programs,)](
        x, h, gate, scale, shift, x1, y, stats,
        B * T, T, D, scale.stride(0), launch.rows, eps, centred, **launch.options,
    )  # fmt: skip


def launch_backward(
    registers, branch, dy, dres, x, scale, shift, stats, dx, y, dscale, dshift, centred
):
    """The branch has h, its gate, dh and dgate, or None of each."""
    (h, gate, dh, dgate), (B, T, D) = branch, x.shape
    launch = tile.row_launch(x, registers)
    outs = [dscale, dshift] if h is None else [dgate, dscale, dshift]
    with sums.sums_of_samples(launch, T, *outs) as parts:
        dgate, dscale, dshift = [None, *parts][-3:]
        _bwd_kernel[(launch.programs,)](
            dy, dres, x, h, gate, scale, shift, stats, dx, dh, y, dgate, dscale, dshift,
            B * T, T, D, scale.stride(0), dscale.stride(0), launch.samples_are_shared, launch.rows,
            centred, **launch.options,
        )  # fmt: skip


def forward_torch(branch, x, scale, shift, y, stats, eps, centred):
    h, gate, x1 = branch
    if h is not None:
        x = torch.addcmul(x.to(stats.dtype), gate[:, None], h)
    x_hat, statistics = normalise(x, eps, centred)
    if x1 is not None:
        x1.copy_(x)
    stats.copy_(statistics)
    torch.addcmul(shift[:, None], x_hat, 1 + scale[:, None].to(x_hat.dtype), out=y)


def backward_torch(branch, dy, dres, x, scale, shift, stats, dx, y, dscale, dshift, centred):
    h, gate, dh, dgate = branch
    x, dy = x.to(stats.dtype), dy.to(stats.dtype)
    if h is not None:
        h = h.to(stats.dtype)
        x = torch.addcmul(x, gate[:, None], h)
    mean, rstd = (t.contiguous() for t in stats.split(1, dim=-1))
    x_hat = (x - mean).mul_(rstd)
    dscale.copy_((dy * x_hat).sum(1))
    dshift.copy_(dy.sum(1))
    weight = 1 + scale[:, None].to(stats.dtype)
    g = weight * dy
    if centred:  # in one pass, where sums and products would take six
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
    else:
        grad = rms_norm_backward(g, x_hat, rstd)
    if y is not None:
        torch.addcmul(shift[:, None], x_hat, weight, out=y)
    if dres is not None:
        grad += dres
    dx.copy_(grad)
    if h is not None:
        dgate.copy_((grad * h).sum(1))
        torch.mul(grad, gate[:, None], out=dh)


def normalise(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """x_hat, and mean and rstd side by side (..., 2), in at least float32.

    Where the variance overflows rstd is NaN: a 0 would be a norm of 0 that no loss tells of.
    """
    x = x.to(checks.statistics_dtype(x))
    if centred:
        x_hat, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        rstd = rstd.masked_fill(rstd == 0, torch.nan)
        x_hat.masked_fill_(rstd.isnan(), torch.nan)
    else:
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        rstd = rstd.masked_fill(rstd == 0, torch.nan)
        x_hat, mean = x * rstd, torch.zeros_like(rstd)
    return x_hat, torch.cat([mean, rstd], dim=-1)


def rms_norm_backward(g: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
    """dx in the dtype of g; rstd is (..., 1)."""
    mean = (g * x_hat).mean(-1, keepdim=True)
    return torch.addcmul(g, x_hat, mean, value=-1).mul_(rstd)


_forward_triton = partial(launch_forward, FORWARD_REGISTERS, [None] * 3)
_backward_triton = partial(launch_backward, BACKWARD_REGISTERS, [None] * 4)
_forward_op = register(
    "adaln_norm_fwd(Tensor x, Tensor scale, Tensor shift, Tensor(a!) y, Tensor(b!) stats,"
    " float eps, bool centred) -> ()",
    triton=_forward_triton,
    torch_=partial(forward_torch, [None] * 3),
)
# dx has dres added where there is one; y is written again where it is given, and may be dy itself:
# each row is read before it is written
adaln_norm_backward = register(
    "adaln_norm_bwd(Tensor dy, Tensor? dres, Tensor x, Tensor scale, Tensor shift, Tensor stats,"
    " Tensor(a!) dx, Tensor(b!)? y, Tensor(c!) dscale, Tensor(d!) dshift, bool centred) -> ()",
    triton=_backward_triton,
    torch_=partial(backward_torch, [None] * 4),
    scratch=lambda dy, dres, x, *_: sums.scratch_of_samples(x, BACKWARD_REGISTERS, 2),
)


# allocation and autograd


def norm_forward(
    op: Callable, options: NormOptions, x: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and its statistics (B, T, 2), by an op that is given them after the others."""
    y = torch.empty_like(x, dtype=options.dtype)
    stats = torch.empty((*x.shape[:2], 2), dtype=checks.statistics_dtype(x), device=x.device)
    op(x, *others, y, stats, options.eps, options.centred)
    return y, stats


adaln_norm_forward = partial(norm_forward, _forward_op)


class _AdaLNNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, options):
        y, stats = adaln_norm_forward(options, x, scale, shift)
        ctx.save_for_backward(x, scale, shift, stats)
        ctx.centred = options.centred
        return y

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("adaln_norm")
        saved = ctx.saved_tensors
        dx, dscale, dshift = map(torch.empty_like, saved[:3])
        into = dx, None, dscale, dshift
        adaln_norm_backward(dy.contiguous(), None, *saved, *into, ctx.centred)
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
    rows = checks.rows_of_samples({"x": x}, {"scale": scale, "shift": shift})
    return checks.as_tokens(_AdaLNNorm.apply(*rows, options), x)


def fold_affine(
    scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale' and shift' that do the work of a norm's weight and bias too.

    Args:
        scale:   (..., D)  any float dtype
        shift:   (..., D)
        weight:  (D,)      of the norm; 1 changes nothing
        bias:    (D,)      of the norm; None is 0, as RMS norm has none
    Returns:
        scale' and shift' (..., D), slices of one tensor, float32 or wider: 1 + scale' in bfloat16
        would lose the weight's small digits.
    Raises:
        ValueError: a shape disagrees.
    """
    D = scale.shape[-1]
    checks.check_shape(scale.shape, "of the shape of scale", shift=shift)
    checks.check_shape((D,), "(D,)", weight=weight, bias=bias)
    dtype = torch.promote_types(scale.dtype, torch.float32)
    one_plus = 1 + scale.to(dtype)
    shift = shift.to(dtype) if bias is None else torch.addcmul(shift.to(dtype), one_plus, bias)
    folded = torch.cat([one_plus * weight - 1, shift], dim=-1)
    return folded[..., :D], folded[..., D:]
