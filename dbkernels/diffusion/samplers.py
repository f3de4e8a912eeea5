"""Samplers of the probability flow: pure functions of a denoiser, a start and a grid of levels.

    dz / dsigma = (z - D(z, sigma)) / sigma

Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without churn. A denoiser takes z and one level,
a float, and returns its estimate D of the clean target. The last level is read out, not left: one
more evaluation there gives the result, as in the published code of arXiv:2506.14202.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Sampler = Literal["euler", "heun"]


def euler(denoiser: Denoiser, z: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow the flow with one evaluation per level.

    Args:
        denoiser:  (z, level) -> estimate of z0
        z:         (B, ...)  a sample at levels[0]
        levels:    descending, positive
    Returns:
        (B, ...)  the estimate of z0 at the last level.
    Raises:
        ValueError: levels are empty, not descending or not positive.
    """
    _check_levels(levels)
    for level, following in pairwise(levels):
        z = z + (following - level) * (z - denoiser(z, level)) / level
    return denoiser(z, levels[-1])


def heun(denoiser: Denoiser, z: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow the flow with a correction after each Euler step: two evaluations per step.

    The correction is evaluated at the next level, so by the block that serves that level. It grows
    an error of the estimates by (level / following - 1) / 2: keep neighbouring levels within a
    factor of about two, which the cdf spacing does not.
    Arguments, result and errors are those of `euler`.
    """
    _check_levels(levels)
    for level, following in pairwise(levels):
        slope = (z - denoiser(z, level)) / level
        predicted = z + (following - level) * slope
        corrected = (predicted - denoiser(predicted, following)) / following
        z = z + (following - level) * (slope + corrected) / 2
    return denoiser(z, levels[-1])


SAMPLERS = {"euler": euler, "heun": heun}


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance: D = D_unconditional + scale * (D_conditional - D_unconditional).

    Ho & Salimans 2022 (arXiv:2207.12598).
    """

    def denoiser(z: Tensor, level: float) -> Tensor:
        without = unconditional(z, level)
        return without + scale * (conditional(z, level) - without)

    return denoiser


def _check_levels(levels: Sequence[float]) -> None:
    descending = all(a > b for a, b in pairwise(levels))
    if not levels or not descending or levels[-1] <= 0:
        raise ValueError(f"levels must be descending and positive, got {list(levels)}")
