"""What the score loss is given beside its tensors: checked, and made one number to a sample."""

from typing import Literal

import torch
from torch import Tensor

from dbkernels.ops._norm import statistics_dtype
from dbkernels.ops.backend import checks

Weight = Literal["edm", "none"] | Tensor
Reduction = Literal["mean", "sum", "none"]


def check_score(
    prediction: Tensor, z0: Tensor, weight: Weight, reduction: str, mask: Tensor | None
) -> None:
    """Raises ValueError where `score_loss` says so."""
    checks.check_floats(prediction=prediction, z0=z0)
    if prediction.shape != z0.shape:
        raise ValueError(
            f"prediction must have the shape of z0 = {tuple(z0.shape)}, "
            f"got {tuple(prediction.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction}")
    _check_weight(weight, z0)
    if mask is not None:
        _check_mask(mask, z0)


def _check_weight(weight: Weight, z0: Tensor) -> None:
    if not isinstance(weight, Tensor):
        if weight not in ("edm", "none"):
            raise ValueError(f"weight must be edm, none or a tensor, got {weight}")
        return
    if weight.shape != z0.shape[:1] or not weight.is_floating_point() or weight.device != z0.device:
        raise ValueError(
            f"weight must be ({z0.shape[0]},) of floats on {z0.device}, "
            f"got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient, because it is given none")


def _check_mask(mask: Tensor, z0: Tensor) -> None:
    shape = z0.shape[: mask.dim()]
    if mask.dim() == 0 or mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of the shape of z0 = {tuple(z0.shape)} or of its first "
            f"dimensions, got {tuple(mask.shape)} {mask.dtype}"
        )
    if mask.device != z0.device:
        raise ValueError(f"mask must be on {z0.device}, got {mask.device}")


def error_weight(
    z0: Tensor, sigma: Tensor, sigma_data: float, weight: Weight, mask: Tensor | None
) -> Tensor | None:
    """k (B,): the weight of a sample's mean squared error of F over all its elements.

    None is 1 for every sample. The weight of the error of D, times c_out**2, and larger by the
    share of the elements that the mask leaves out.
    """
    k = None
    if not isinstance(weight, str) or weight == "none":
        sigma = sigma.to(statistics_dtype(z0))
        k = (sigma * sigma_data).square() / (sigma.square() + sigma_data**2)
        k = k if isinstance(weight, str) else k * weight.to(k.dtype)
    if mask is None or not z0.numel():
        return k
    counted = mask.reshape(len(z0), -1).sum(1).clamp_(min=1)
    share = (mask.numel() // len(z0)) / counted.to(statistics_dtype(z0))
    return share if k is None else k * share
