"""A norm's own weight and bias, folded into the modulation that follows it.

    (1 + scale) * (weight * x_hat + bias) + shift = (1 + scale') * x_hat + shift'
    scale' = (1 + scale) * weight - 1
    shift' = (1 + scale) * bias + shift

So no kernel needs to know whether a norm is affine: the fold is over samples, not over tokens.
"""

import torch
from torch import Tensor

from dbkernels.ops.backend import checks


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
    if scale.shape != shift.shape:
        raise ValueError(
            f"scale and shift must have one shape, got {tuple(scale.shape)} and "
            f"{tuple(shift.shape)}"
        )
    checks.check_shape((D,), "(D,)", weight=weight, bias=bias)
    dtype = torch.promote_types(scale.dtype, torch.float32)
    one_plus = 1 + scale.to(dtype)
    shift = shift.to(dtype) if bias is None else torch.addcmul(shift.to(dtype), one_plus, bias)
    folded = torch.cat([one_plus * weight - 1, shift], dim=-1)
    return folded[..., :D], folded[..., D:]
