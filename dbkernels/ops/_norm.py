"""The norm of a row and its gradient, for the kernels that modulate one and for plain torch.

    x_hat = (x - mean) * rstd,    rstd = 1 / sqrt(mean((x - mean)**2) + eps)

RMS norm is the same with a mean of 0. With g the gradient in x_hat and every mean over D:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),    without mean(g) for RMS norm
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend.tile import load_vector, mean_row, mul_rows


class NormOptions(NamedTuple):
    """What a conditioned norm is told beside its tensors."""

    eps: float
    centred: bool
    dtype: torch.dtype


class Modulation(NamedTuple):
    """(B, D) each, equal strides."""

    gate: Tensor
    scale: Tensor
    shift: Tensor


@triton.jit
def normalise_row(x, D, eps, CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """x_hat, mean and rstd of rows that hold 0 past D; x_hat holds 0 there too."""
    mean = mean_row(x, D, PIECES) if CENTRED else tl.zeros((x[0].shape[0], 1), tl.float32)
    x_centred = ()
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        # lanes past D hold -mean here, which would count towards the variance
        x_centred += (tl.where(cols < D, x[piece] - mean, 0.0),)
    rstd = 1 / tl.sqrt(mean_row(mul_rows(x_centred, x_centred, PIECES), D, PIECES) + eps)
    return standardise_row(x_centred, 0.0, rstd, PIECES), mean, rstd


@triton.jit
def standardise_row(x, mean, rstd, PIECES: tl.constexpr):
    x_hat = ()
    for piece in tl.static_range(PIECES):
        x_hat += ((x[piece] - mean) * rstd,)
    return x_hat


@triton.jit
def normalise_row_backward(g, x_hat, rstd, D, CENTRED: tl.constexpr, PIECES: tl.constexpr):
    """dx of rows; g must hold 0 past D."""
    g_mean = mean_row(g, D, PIECES) if CENTRED else 0.0
    gx_mean = mean_row(mul_rows(g, x_hat, PIECES), D, PIECES)
    dx = ()
    for piece in tl.static_range(PIECES):
        dx += (rstd * (g[piece] - g_mean - x_hat[piece] * gx_mean),)
    return dx


@triton.jit
def load_stats(ptr, row, mask):
    """mean and rstd of rows, (BLOCK_T, 1) each."""
    mean = tl.load(ptr + 2 * row, mask=mask, other=0.0)
    rstd = tl.load(ptr + 2 * row + 1, mask=mask, other=0.0)
    return mean, rstd


@triton.jit
def store_stats(ptr, row, mask, mean, rstd):
    tl.store(ptr + 2 * row, mean, mask=mask)
    tl.store(ptr + 2 * row + 1, rstd, mask=mask)


@triton.jit
def load_weight(
    scale_ptr, start, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """1 + scale, for all rows of a tile."""
    scale = load_vector(scale_ptr, start, D, BLOCK_T, BLOCK_D, PIECES)
    weight = ()
    for piece in tl.static_range(PIECES):
        weight += (1 + scale[piece],)
    return weight


def normalise(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """x_hat, and mean and rstd side by side (..., 2), in at least float32."""
    x = x.to(statistics_dtype(x))
    if centred:
        x_hat, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    else:
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        x_hat, mean = x * rstd, torch.zeros_like(rstd)
    return x_hat, torch.cat([mean, rstd], dim=-1)


def standardise(x: Tensor, stats: Tensor) -> Tensor:
    """x_hat, from x in the dtype of its statistics."""
    mean, rstd = stats.split(1, dim=-1)
    return (x - mean).mul_(rstd)


def normalise_backward(g: Tensor, x: Tensor, x_hat: Tensor, stats: Tensor, centred: bool) -> Tensor:
    """dx in the dtype of g, x and x_hat, which is that of stats."""
    if not centred:
        return rms_norm_backward(g, x_hat, stats[..., 1:])
    mean, rstd = (t.contiguous() for t in stats.split(1, dim=-1))
    # one pass, where sums and products would take six
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )
    return dx


def rms_norm_backward(g: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
    """dx in the dtype of g; rstd is (..., 1)."""
    mean = (g * x_hat).mean(-1, keepdim=True)
    return torch.addcmul(g, x_hat, mean, value=-1).mul_(rstd)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 for the float64 that plain torch also takes."""
    return torch.promote_types(x.dtype, torch.float32)
