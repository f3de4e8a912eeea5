"""The squared error of a network in what it should predict, and its gradient, in one pass over F.

    e = F - (alpha * z0 + beta * noise),    loss[b] = mean(weight * e**2)

alpha, beta and weight are of a sample or of a token; the noise is that of `add_noise`, drawn again.
Karras et al. 2022 (arXiv:2206.00364), table 1 and equation 8, is one choice of them: with
s = sqrt(sigma**2 + sigma_data**2), alpha = sigma / (sigma_data * s) and beta = -sigma_data / s, the
error of the denoiser D is c_out * e, without a difference of large numbers.

Gradients, with r the reduction over B, and z a constant for F but not for the loss:

    dF  = r * weight * 2 * e / elements
    dz0 = -alpha * dF
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.add_noise import check_coefficients, check_finite, of_chunk
from dbkernels.ops.backend import checks, noise_tile
from dbkernels.ops.backend.register import is_last_to_read, register
from dbkernels.ops.philox import Draw, kernel_draw, noise_chunks, noise_launch, sizes

# kernels


@triton.jit(do_not_specialize=noise_tile.DRAW)
def _fwd_kernel(
    prediction_ptr, z0_ptr,          # (B, elements) twice
    alpha_ptr, beta_ptr, weight_ptr,  # (B, elements / run) each
    mask_ptr,                        # (B, elements / mask_run)
    dprediction_ptr, dz0_ptr,        # (B, elements) twice
    losses_ptr,                      # (B, tiles)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements, run, mask_run, r,
    PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, inside = noise_tile.tile_of_sample(elements, BLOCK)
    at = batch * elements + start
    of_run = noise_tile.coefficient_at(batch, start, lanes, elements, run, PER_SAMPLE, BLOCK)
    alpha, beta = tl.load(alpha_ptr + of_run), tl.load(beta_ptr + of_run)
    weight = 1.0 if weight_ptr is None else tl.load(weight_ptr + of_run)
    prediction = tl.load(prediction_ptr + at + lanes, mask=inside, other=0.0).to(tl.float32)
    z0 = tl.load(z0_ptr + at + lanes, mask=inside, other=0.0).to(tl.float32)

    noise = noise_tile.noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    e = prediction - (alpha * z0 + beta * noise)
    counted = inside
    if mask_ptr is not None:
        entry = noise_tile.run_of_lane(start, lanes, mask_run, BLOCK)
        entry = batch * (elements // mask_run) + entry
        counted = inside & (tl.load(mask_ptr + entry, mask=inside, other=0) != 0)
    # a prediction that does not count may be anything, NaN too
    e = tl.where(counted, e, 0.0)
    weighted = e * (weight / elements)
    grad = 2 * r * weighted

    if dprediction_ptr is not None:
        tl.store(dprediction_ptr + at + lanes, grad, mask=inside)
    if dz0_ptr is not None:
        tl.store(dz0_ptr + at + lanes, -alpha * grad, mask=inside)
    # each program owns one partial sum: no atomics, so every run gives the same bits
    tl.store(losses_ptr + tl.program_id(0), tl.sum(e * weighted))


# launchers: they write into tensors of their caller


def _forward_triton(prediction, z0, alpha, beta, weight, mask, dprediction, dz0, losses, *rest):
    *draw, r = rest
    B, elements = sizes(z0)
    grid, options = noise_launch(B, elements)
    run, per_sample = z0.numel() // alpha.numel(), alpha.numel() == B
    mask_run = 1 if mask is None else z0.numel() // mask.numel()
    mask = None if mask is None else mask.view(torch.uint8)
    sums = losses
    if grid[0] > B:
        sums = torch.empty((B, grid[0] // B), dtype=losses.dtype, device=losses.device)
    _fwd_kernel[grid](
        prediction, z0, alpha, beta, weight, mask, dprediction, dz0, sums,
        *kernel_draw(draw), elements, run, mask_run, r, per_sample, **options,
    )  # fmt: skip
    if sums is not losses:
        torch.sum(sums, 1, out=losses)


def _forward_torch(prediction, z0, alpha, beta, weight, mask, dprediction, dz0, losses, *rest):
    *draw, r = rest
    B, elements = sizes(z0)
    prediction, z0 = prediction.view(B, elements), z0.view(B, elements)
    alpha, beta = alpha.to(losses.dtype), beta.to(losses.dtype)
    scale = (torch.ones_like(alpha) if weight is None else weight.to(losses.dtype)) / elements
    out = None if mask is None else ~mask
    losses.zero_()
    for rows, cols, noise in noise_chunks(draw, B, elements, z0.device):
        a, b, s = (of_chunk(c, elements, rows, cols) for c in (alpha, beta, scale))
        e = noise.to(losses.dtype).mul_(b).addcmul_(z0[rows, cols].to(losses.dtype), a)
        e.neg_().add_(prediction[rows, cols])
        if out is not None:
            e.masked_fill_(of_chunk(out, elements, rows, cols), 0)
        weighted = e * s
        losses[rows] += torch.linalg.vecdot(e, weighted)
        weighted.mul_(2 * r)
        if dprediction is not None:
            dprediction.view(B, elements)[rows, cols] = weighted
        if dz0 is not None:
            torch.mul(weighted, -a, out=dz0.view(B, elements)[rows, cols])


def _scratch(prediction, z0, *_):
    (programs,), _ = noise_launch(*sizes(z0))
    return programs if programs > len(z0) else 0


_forward_op = register(
    "score_loss_fwd(Tensor prediction, Tensor z0, Tensor alpha, Tensor beta, Tensor? weight,"
    " Tensor? mask, Tensor(a!)? dprediction, Tensor(b!)? dz0, Tensor(c!) losses,"
    " SymInt seed, Tensor step, SymInt sample, float r) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
    check=lambda prediction, z0, *given: check_finite(("alpha", "beta", "weight"), *given),
    scratch=_scratch,
)


# autograd


class _ScoreLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, z0, alpha, beta, weight, mask, draw, reduction, inplace):
        dprediction = dz0 = None
        if ctx.needs_input_grad[0] and inplace:
            # whoever else had saved it is told, instead of reading a gradient for a prediction
            torch.autograd.graph.increment_version(prediction)
            dprediction = prediction.detach()
        elif ctx.needs_input_grad[0]:
            dprediction = torch.empty_like(prediction)
        if ctx.needs_input_grad[1]:
            dz0 = torch.empty_like(z0)
        dtype = torch.promote_types(checks.statistics_dtype(prediction), z0.dtype)
        losses = torch.empty(len(z0), dtype=dtype, device=z0.device)
        r = 1 / max(len(z0), 1) if reduction == "mean" else 1.0
        _forward_op(prediction, z0, alpha, beta, weight, mask, dprediction, dz0, losses, *draw, r)
        ctx.save_for_backward(dprediction, dz0)
        ctx.mark_non_differentiable(losses)
        reduced = {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}
        return reduced[reduction](), losses

    @staticmethod
    def backward(ctx, dloss, _):
        checks.refuse_double_backward("score_loss")
        grads = ctx.saved_tensors
        return *(None if grad is None else _scaled(grad, dloss) for grad in grads), *[None] * 7


def _scaled(grad: Tensor, dloss: Tensor) -> Tensor:
    """The stored gradient times the upstream, a scalar or (B,), in its own memory if it may."""
    dloss = dloss.view(-1, *[1] * (grad.dim() - 1)) if dloss.dim() else dloss
    return grad.mul_(dloss) if is_last_to_read() else (grad * dloss).to(grad.dtype)


# public


def score_loss(
    prediction: Tensor,
    z0: Tensor,
    alpha: Tensor,
    beta: Tensor,
    draw: Draw,
    *,
    weight: Tensor | None = None,
    reduction: checks.Reduction = "mean",
    mask: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of a prediction of alpha * z0 + beta * noise, that of `add_noise`.

    The forward computes the gradients too; the backward scales them. An incoming gradient that is
    no power of two so rounds them a second time.

    Args:
        prediction:   (B, ...)        F, what the network made of z: float32, bfloat16 or float16
        z0:           (B, ...)        clean target, any of these dtypes; z is a constant for F here,
                      as its gradient through F reaches z0 by `add_noise`
        alpha:        (B,) or (B, T)  float32, of each sample or of each token of z0 (B, T, ...)
        beta:         likewise
        draw:         what `add_noise` was given
        weight:       (B,) or (B, T)  float32, in the mean over a sample's elements; None is 1
        reduction:    over the samples: "mean", "sum", or "none" for (B,)
        mask:         bool, the shape of z0 or of its first dimensions: the elements that count, and
                      over which the mean is. A sample of which none counts has a loss of 0
        inplace:      write the gradient over the prediction, where it requires one. Whoever has
                      saved a contiguous prediction for its own backward raises there
    Returns:
        The loss, float32; and each sample's (B,), weighted, before the reduction, without gradient.
    Raises:
        ValueError: a shape, dtype or device disagrees, reduction is unknown, alpha, beta or weight
            requires a gradient, the draw has not that many samples or its step is on another
            device, or a prediction to write over is a leaf that requires a gradient. Also an alpha,
            beta or weight that is not finite; on a GPU, where to look at it would wait for the
            device, neither are the loss and gradients of its sample.
        RuntimeError: the gradient is differentiated.
    """
    _check(prediction, z0, alpha, beta, weight, reduction, mask)
    if inplace and prediction.is_leaf and prediction.requires_grad:
        raise ValueError("prediction must be computed, got a leaf that requires a gradient")
    arguments = draw.arguments(*sizes(z0), z0.device)
    coefficients = _alike(alpha, beta, _over_all_elements(weight, mask, z0))
    mask = None if mask is None else mask.contiguous()
    prediction, z0 = prediction.contiguous(), z0.contiguous()
    if not torch.is_grad_enabled():  # which no function is told that asks who requires a gradient
        prediction, z0 = prediction.detach(), z0.detach()
    return _ScoreLoss.apply(prediction, z0, *coefficients, mask, arguments, reduction, inplace)


def _check(prediction, z0, alpha, beta, weight, reduction, mask):
    check_coefficients(z0, alpha=alpha, beta=beta)
    checks.check_floats(prediction=prediction, z0=z0)
    checks.check_shape(z0.shape, "of the shape of z0", prediction=prediction)
    checks.check_reduction(reduction)
    if weight is not None:
        check_coefficients(z0, weight=weight)
    if mask is None:
        return
    if mask.dim() == 0 or mask.shape != z0.shape[: mask.dim()] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of the shape of z0 = {tuple(z0.shape)} or of its first "
            f"dimensions, got {tuple(mask.shape)} {mask.dtype}"
        )
    if mask.device != z0.device:
        raise ValueError(f"mask must be on {z0.device}, got {mask.device}")


def _over_all_elements(weight: Tensor | None, mask: Tensor | None, z0: Tensor) -> Tensor | None:
    """The weight in the mean over all elements, larger by the share that the mask leaves out."""
    if mask is None or not z0.numel():
        return weight
    counted = mask.reshape(len(z0), -1).sum(1).clamp_(min=1)
    share = (mask.numel() // len(z0)) / counted.to(checks.statistics_dtype(z0))
    if weight is None:
        return share
    return weight * (share[:, None] if weight.dim() == 2 else share)


def _alike(*given: Tensor | None) -> list[Tensor | None]:
    """All of each token where one is."""
    shape = next((c.shape for c in given if c is not None and c.dim() == 2), given[0].shape)
    wide = (c if c is None or c.dim() == len(shape) else c[:, None].expand(shape) for c in given)
    return [c if c is None else c.contiguous() for c in wide]
