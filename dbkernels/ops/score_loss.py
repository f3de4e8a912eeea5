"""The score-matching loss of a preconditioned network and its gradient, in one pass over F.

    D = c_skip * z + c_out * F,    z = z0 + sigma * noise

    loss[b] = weight[b] * mean((D - z0)**2)

Karras et al. 2022 (arXiv:2206.00364), table 1 and equation 8; the noise is drawn again. With
s = sqrt(sigma**2 + sigma_data**2) the error is c_out times that of F, without a difference of large
numbers, and k = weight * c_out**2 is 1 for the EDM weight:

    e = F - (sigma / sigma_data * z0 - sigma_data * noise) / s,    loss[b] = k[b] * mean(e**2)

Gradients, with r the reduction over B, and z a constant for F but not for the loss:

    dF  = r * k * 2 * e / elements
    dz0 = -sigma / (sigma_data * s) * dF
"""

from typing import NamedTuple

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
from dbkernels.ops._score_checks import Reduction, Weight, check_score, error_weight
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.graph import is_last_to_read
from dbkernels.ops.backend.register import register
from dbkernels.ops.philox import Draw


class _Options(NamedTuple):
    draw: DrawArguments
    sigma_data: float
    reduction: Reduction
    owned: bool  # whether the gradient goes over the prediction


# kernels


@triton.jit(do_not_specialize=DRAW)
def _fwd_kernel(
    prediction_ptr, z0_ptr,         # (B, elements) twice
    sigma_ptr, k_ptr, mask_ptr,     # (B,), (B,), (B, elements / run)
    dprediction_ptr, dz0_ptr,       # (B, elements) twice
    losses_ptr,                     # (B, tiles)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements, run, sigma_data, r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, inside = tile_of_sample(elements, BLOCK)
    at = batch * elements + start
    sigma = load_level(sigma_ptr, batch)
    k = 1.0 if k_ptr is None else tl.load(k_ptr + batch)
    prediction = tl.load(prediction_ptr + at + lanes, mask=inside, other=0.0).to(tl.float32)
    z0 = tl.load(z0_ptr + at + lanes, mask=inside, other=0.0).to(tl.float32)

    s = tl.sqrt(sigma * sigma + sigma_data * sigma_data)
    of_z0 = sigma / (sigma_data * s)
    noise = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    e = prediction - (of_z0 * z0 - sigma_data / s * noise)
    counted = inside
    if mask_ptr is not None:
        mask_at = batch * (elements // run) + (start + lanes) // run
        counted = inside & (tl.load(mask_ptr + mask_at, mask=inside, other=0) != 0)
    # a prediction that does not count may be anything, NaN too
    e = tl.where(counted, e, 0.0)
    grad = e * (2 * r * k / elements)

    if dprediction_ptr is not None:
        tl.store(dprediction_ptr + at + lanes, grad, mask=inside)
    if dz0_ptr is not None:
        tl.store(dz0_ptr + at + lanes, -of_z0 * grad, mask=inside)
    # each program owns one partial sum: no atomics, so every run gives the same bits
    tl.store(losses_ptr + tl.program_id(0), tl.sum(e * e) * (k / elements))


# launchers: they write into tensors of their caller


def _forward_triton(prediction, z0, sigma, k, mask, dprediction, dz0, losses, *rest):
    *draw, sigma_data, r = rest
    B, elements = sizes(z0)
    grid, options = noise_launch(B, elements)
    run = 1 if mask is None else z0.numel() // mask.numel()
    mask = None if mask is None else mask.view(torch.uint8)
    tiles = grid[0] // B
    shape, like = (B, tiles), {"dtype": losses.dtype, "device": losses.device}
    sums = losses if tiles == 1 else torch.empty(shape, **like)
    _fwd_kernel[grid](
        prediction, z0, sigma, k, mask, dprediction, dz0, sums,
        *kernel_draw(draw), elements, run, sigma_data, r, **options,
    )  # fmt: skip
    if tiles > 1:
        torch.sum(sums, 1, out=losses)


def _forward_torch(prediction, z0, sigma, k, mask, dprediction, dz0, losses, *rest):
    *draw, sigma_data, r = rest
    B, elements = sizes(z0)
    sigma = sigma.to(losses.dtype)[:, None]
    s = (sigma.square() + sigma_data**2).sqrt()
    of_z0, of_noise = sigma / (sigma_data * s), sigma_data / s
    scale = torch.full_like(sigma, 1 / elements) if k is None else k[:, None] / elements
    out = None if mask is None else ~_per_element(mask, B, elements)
    prediction, z0 = prediction.view(B, elements), z0.view(B, elements)
    losses.zero_()
    for rows, cols, noise in noise_chunks(draw, B, elements, z0.device):
        e = noise.to(losses.dtype).mul_(of_noise[rows])
        e.addcmul_(z0[rows, cols].to(e.dtype), of_z0[rows], value=-1).add_(prediction[rows, cols])
        if out is not None:
            e.masked_fill_(out[rows, cols], 0)
        losses[rows] += torch.linalg.vecdot(e, e) * scale[rows, 0]
        e.mul_(2 * r * scale[rows])
        if dprediction is not None:
            dprediction.view(B, elements)[rows, cols] = e
        if dz0 is not None:
            torch.mul(e, -of_z0[rows], out=dz0.view(B, elements)[rows, cols])


def _per_element(mask: Tensor, B: int, elements: int) -> Tensor:
    run = B * elements // mask.numel()
    return mask.view(B, -1, 1).expand(-1, -1, run).reshape(B, elements)


_forward_op = register(
    "score_loss_fwd(Tensor prediction, Tensor z0, Tensor sigma, Tensor? k, Tensor? mask,"
    " Tensor(a!)? dprediction, Tensor(b!)? dz0, Tensor(c!) losses,"
    " SymInt seed, Tensor step, SymInt sample, float sigma_data, float r) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
    check=lambda prediction, z0, sigma, *_: check_levels(sigma),
)


# allocation and autograd


def score_loss_forward(
    prediction: Tensor,
    z0: Tensor,
    sigma: Tensor,
    k: Tensor | None,
    mask: Tensor | None,
    options: _Options,
    *,
    dprediction: Tensor | None,
    dz0: Tensor | None,
) -> Tensor:
    """losses (B,); writes the gradients that are given. dprediction may be prediction itself.

    All are contiguous.
    """
    dtype = torch.promote_types(statistics_dtype(prediction), z0.dtype)
    losses = torch.empty(len(z0), dtype=dtype, device=z0.device)
    if z0.numel():
        r = 1 / len(z0) if options.reduction == "mean" else 1.0
        _forward_op(
            prediction, z0, sigma, k, mask, dprediction, dz0, losses,
            *options.draw, options.sigma_data, r,
        )  # fmt: skip
    else:
        losses.zero_()
    return losses


class _ScoreLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, z0, sigma, k, mask, options):
        dprediction = dz0 = None
        if ctx.needs_input_grad[0]:
            dprediction = _buffer(prediction, options.owned)
        if ctx.needs_input_grad[1]:
            dz0 = torch.empty_like(z0)
        losses = score_loss_forward(
            prediction, z0, sigma, k, mask, options, dprediction=dprediction, dz0=dz0
        )
        ctx.save_for_backward(dprediction, dz0)
        reduced = {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}
        ctx.mark_non_differentiable(losses)
        return reduced[options.reduction](), losses

    @staticmethod
    def backward(ctx, dloss, _):
        checks.refuse_double_backward("score_loss")
        grads = ctx.saved_tensors
        return *(None if grad is None else _scaled(grad, dloss) for grad in grads), *[None] * 4


def _buffer(prediction: Tensor, owned: bool) -> Tensor:
    if not owned:
        return torch.empty_like(prediction)
    # whoever else had saved it is told, instead of reading a gradient for a prediction
    torch.autograd.graph.increment_version(prediction)
    return prediction.detach()


def _scaled(grad: Tensor, dloss: Tensor) -> Tensor:
    """The stored gradient times the upstream, a scalar or (B,), in its own memory if it may."""
    dloss = dloss.view(-1, *[1] * (grad.dim() - 1)) if dloss.dim() else dloss
    return grad.mul_(dloss) if is_last_to_read() else (grad * dloss).to(grad.dtype)


# public


def score_loss(
    prediction: Tensor,
    z0: Tensor,
    sigma: Tensor,
    draw: Draw,
    *,
    sigma_data: float,
    weight: Weight = "edm",
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of the denoiser D = c_skip * z + c_out * F for the z of `add_noise`.

    The forward computes the gradients too; the backward scales them. An incoming gradient that is
    no power of two so rounds them a second time.

    Args:
        prediction:  (B, ...)  F, what the network made of c_in * z: float32, bfloat16 or float16
        z0:          (B, ...)  clean target, any of these dtypes; z is a constant for F here, as
                     its gradient through F reaches z0 by `add_noise`
        sigma:       (B,)      float32, what `add_noise` was given
        draw:        what `add_noise` was given
        sigma_data:  standard deviation of the clean target
        weight:      "edm" is 1 / c_out**2, "none" is 1; or (B,), which is given no gradient
        reduction:   over the samples: "mean", "sum", or "none" for (B,)
        mask:        bool, the shape of z0 or of its first dimensions: the elements that count. A
                     sample of which none counts has a loss of 0
    Returns:
        The loss, float32; and each sample's (B,), weighted, before the reduction, without gradient.
    Raises:
        ValueError: a shape, dtype or device disagrees, weight or reduction is unknown, sigma or
            weight requires a gradient, sigma_data is not positive, or the draw has not that many
            samples or its step is on another device. Also a sigma that is not positive or not
            finite; on a GPU, where to look at it would wait for the device, its sample's loss and
            gradients are NaN.
        RuntimeError: the gradient is differentiated.
    """
    check_noise("z0", z0, sigma, sigma_data)
    check_score(prediction, z0, weight, reduction, mask)
    options = _Options(draw.arguments(*sizes(z0), z0.device), sigma_data, reduction, owned=False)
    return _apply(prediction, z0, sigma, weight, mask, options)


def score_loss_(
    prediction: Tensor,
    z0: Tensor,
    sigma: Tensor,
    draw: Draw,
    *,
    sigma_data: float,
    weight: Weight = "edm",
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`score_loss` that writes the gradient over the prediction, where it requires one.

    Whoever has saved a contiguous prediction for its own backward raises there.

    Args, Returns, Raises: of `score_loss`; and
        ValueError: prediction is a leaf that requires a gradient.
    """
    check_noise("z0", z0, sigma, sigma_data)
    check_score(prediction, z0, weight, reduction, mask)
    if prediction.is_leaf and prediction.requires_grad:
        raise ValueError("prediction must be computed, got a leaf that requires a gradient")
    options = _Options(draw.arguments(*sizes(z0), z0.device), sigma_data, reduction, owned=True)
    return _apply(prediction, z0, sigma, weight, mask, options)


def _apply(prediction, z0, sigma, weight, mask, options):
    k = error_weight(z0, sigma, options.sigma_data, weight, mask)
    mask = None if mask is None else mask.contiguous()
    prediction, z0, sigma = (t.contiguous() for t in (prediction, z0, sigma))
    if not torch.is_grad_enabled():  # which no function is told that asks who requires a gradient
        prediction, z0 = prediction.detach(), z0.detach()
    return _ScoreLoss.apply(prediction, z0, sigma, k, mask, options)
