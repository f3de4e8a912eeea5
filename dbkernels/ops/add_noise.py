"""A noisy target, preconditioned or not, from noise that is drawn where it is used and not stored.

    z = z0 + sigma[b] * noise,    times c_in = 1 / sqrt(sigma**2 + sigma_data**2) where asked for

Karras et al. 2022 (arXiv:2206.00364), table 1; the noise is that of `philox`. Backward:

    dz0 = dz,    times c_in
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._noise import (
    DRAW,
    DrawArguments,
    check_levels,
    check_noise,
    kernel_draw,
    load_level,
    noise_chunks,
    noise_launch,
    noise_tile,
    sizes,
    tile_of_sample,
)
from dbkernels.ops._norm import statistics_dtype
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import register
from dbkernels.ops.philox import Draw


class _Options(NamedTuple):
    scaled: bool
    sigma_data: float
    dtype: torch.dtype


# kernels


@triton.jit(do_not_specialize=DRAW)
def _fwd_kernel(
    z0_ptr, sigma_ptr,  # (B, elements), (B,)
    z_ptr,              # (B, elements)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements, sigma_data,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, mask = tile_of_sample(elements, BLOCK)
    at = batch * elements + start
    sigma = load_level(sigma_ptr, batch)
    z0 = tl.load(z0_ptr + at + lanes, mask=mask, other=0.0).to(tl.float32)

    noise = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    z = z0 + sigma * noise
    if SCALED:
        z /= tl.sqrt(sigma * sigma + sigma_data * sigma_data)

    tl.store(z_ptr + at + lanes, z, mask=mask)


# launchers: they write into tensors of their caller


def _forward_triton(z0, sigma, z, *rest):
    *draw, scaled, sigma_data = rest
    B, elements = sizes(z0)
    grid, options = noise_launch(B, elements)
    draw = kernel_draw(draw)
    _fwd_kernel[grid](z0, sigma, z, *draw, elements, sigma_data, scaled, **options)


def _forward_torch(z0, sigma, z, *rest):
    *draw, scaled, sigma_data = rest
    B, elements = sizes(z0)
    z0, z = z0.view(B, elements), z.view(B, elements)
    sigma = sigma.to(statistics_dtype(z0))[:, None]
    for rows, cols, noise in noise_chunks(draw, B, elements, z0.device):
        noisy = noise.to(sigma.dtype).mul_(sigma[rows]).add_(z0[rows, cols])
        if scaled:
            noisy.mul_(c_in(sigma[rows], sigma_data))
        z[rows, cols] = noisy


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    return (sigma.square() + sigma_data**2).rsqrt()


_forward_op = register(
    "add_noise_fwd(Tensor z0, Tensor sigma, Tensor(a!) z,"
    " SymInt seed, Tensor step, SymInt sample, bool scaled, float sigma_data) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
    check=lambda z0, sigma, *_: check_levels(sigma),
)


# allocation and autograd


def add_noise_forward(z0: Tensor, sigma: Tensor, draw: DrawArguments, options: _Options) -> Tensor:
    """z in the shape of z0, which is contiguous."""
    z = torch.empty_like(z0, dtype=options.dtype)
    if z0.numel():
        _forward_op(z0, sigma, z, *draw, options.scaled, options.sigma_data)
    return z


def add_noise_backward(dz: Tensor, sigma: Tensor, options: _Options, dtype: torch.dtype) -> Tensor:
    """dz0 in `dtype`; of one number to a sample, so plain torch reads and writes it once too."""
    if not options.scaled:
        return dz.to(dtype)
    scale = c_in(sigma.to(torch.promote_types(dtype, sigma.dtype)), options.sigma_data)
    dz0 = torch.empty_like(dz, dtype=dtype)
    return torch.mul(dz, scale.view(-1, *[1] * (dz.dim() - 1)), out=dz0)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z0, sigma, draw, options):
        ctx.save_for_backward(sigma)
        ctx.options, ctx.dtype = options, z0.dtype
        return add_noise_forward(z0, sigma, draw, options)

    @staticmethod
    def backward(ctx, dz):
        checks.refuse_double_backward("add_noise")
        (sigma,) = ctx.saved_tensors
        return add_noise_backward(dz, sigma, ctx.options, ctx.dtype), None, None, None


# public


def add_noise(
    z0: Tensor,
    sigma: Tensor,
    draw: Draw,
    *,
    scale: Literal["c_in"] | None = None,
    sigma_data: float = 0.5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """z0 + sigma * noise, in one read and one write; `score_loss` draws the same noise again.

    Args:
        z0:          (B, ...)  clean target: float32, bfloat16 or float16; its gradient passes
        sigma:       (B,)      float32, units of z0
        draw:        names the noise of sample 0; sample b has that of draw.sample + b
        scale:       "c_in" multiplies by 1 / sqrt(sigma**2 + sigma_data**2), as a network wants it
        sigma_data:  standard deviation of the clean target
        dtype:       of the result, one that z0 may have; None is that of z0
    Returns:
        (B, ...). Everything is float32 inside, and rounded once.
    Raises:
        ValueError: a shape, dtype or device disagrees, scale or dtype is unknown, sigma requires a
            gradient, sigma_data is not positive, or the draw has not that many samples or its step
            is on another device. Also a sigma that is not positive or not finite; on a GPU, where
            to look at it would wait for the device, its sample is NaN.
        RuntimeError: the gradient is differentiated.
    """
    if scale not in (None, "c_in"):
        raise ValueError(f"scale must be None or c_in, got {scale}")
    check_noise("z0", z0, sigma, sigma_data)
    dtype = checks.result_dtype(dtype, z0)
    arguments = draw.arguments(*sizes(z0), z0.device)
    options = _Options(scale == "c_in", sigma_data, dtype)
    return _AddNoise.apply(z0.contiguous(), sigma.contiguous(), arguments, options)
