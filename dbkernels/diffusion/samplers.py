"""Samplers of the probability flow: pure functions of a denoiser, a start, levels and their path.

On a path z = a z0 + s noise the denoiser's estimate D of z0 leaves n = (z - a D) / s as the noise,
and a sample follows

    dz = D da + n ds

A denoiser takes z and one level, a float, and returns D. The last level is read out, not left: one
more evaluation there gives the result, as in the published code of arXiv:2506.14202. For a straight
path that is Euler's step from the last level to 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from dbkernels.diffusion.path import Path, at

Denoiser = Callable[[Tensor, float], Tensor]


def euler(denoiser: Denoiser, z: Tensor, levels: Sequence[float], path: Path) -> Tensor:
    """Follow the flow with one evaluation per level; of first order.

    On a path of constant variance it is DDIM without noise: Song et al. 2020 (arXiv:2010.02502).

    Args:
        denoiser:  (z, level) -> estimate of z0
        z:         (B, ...)  a sample at levels[0]
        levels:    descending
        path:      that the samples are on; at the last level there has to be noise
    Returns:
        (B, ...)  the estimate of z0 at the last level.
    Raises:
        ValueError: levels are empty, not descending, or not on the path.
    """
    for level, _, (a, s), (next_a, next_s) in _steps(levels, path):
        D = denoiser(z, level)
        z = z + (next_a - a) * D + (next_s - s) * (z - a * D) / s
    return denoiser(z, levels[-1])


def heun(denoiser: Denoiser, z: Tensor, levels: Sequence[float], path: Path) -> Tensor:
    """Follow the flow with a correction after each Euler step; of second order.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without churn: two evaluations per step. The
    correction is evaluated at the next level, so by the block that serves that level. It grows an
    error of the estimates by (s / next s - 1) / 2: keep neighbouring levels within a factor of
    about two, which the cdf spacing does not.
    Arguments, result and errors are those of `euler`.
    """
    for level, following, (a, s), (next_a, next_s) in _steps(levels, path):
        D = denoiser(z, level)
        noise = (z - a * D) / s
        predicted = z + (next_a - a) * D + (next_s - s) * noise
        next_D = denoiser(predicted, following)
        next_noise = (predicted - next_a * next_D) / next_s
        z = z + (next_a - a) * (D + next_D) / 2 + (next_s - s) * (noise + next_noise) / 2
    return denoiser(z, levels[-1])


def dpmpp_2m(denoiser: Denoiser, z: Tensor, levels: Sequence[float], path: Path) -> Tensor:
    """DPM-Solver++(2M): of second order with one evaluation per level.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2: over ln(a / s), the estimate of a step is
    extended on the line through the last two; the first step is Euler's.
    Arguments, result and errors are those of `euler`.
    """
    before: Tensor | None = None
    width_before = math.inf
    for level, _, (a, s), (next_a, next_s) in _steps(levels, path):
        D = denoiser(z, level)
        # a first level that has nothing left of z0 is at minus infinity
        width = math.log(next_a / next_s) - math.log(a / s) if a else math.inf
        # of a first step, or after one of infinite width, there is no line
        extended = D
        if before is not None and not math.isinf(width_before):
            extended = D + width / width_before / 2 * (D - before)
        z = next_s / s * z + (next_a - a * next_s / s) * extended
        before, width_before = D, width
    return denoiser(z, levels[-1])


@dataclass(frozen=True)
class Solver:
    """A sampler and what it needs.

    run:    takes a denoiser, a start, levels and their path
    close:  whether neighbouring levels have to be close all the way
    """

    run: Callable[[Denoiser, Tensor, Sequence[float], Path], Tensor]
    close: bool


SAMPLERS = {
    "euler": Solver(euler, close=False),
    "heun": Solver(heun, close=True),
    "dpmpp_2m": Solver(dpmpp_2m, close=True),
}
if TYPE_CHECKING:
    Sampler = str
else:
    Sampler = Literal[tuple(SAMPLERS)]


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance: D = D_unconditional + scale * (D_conditional - D_unconditional).

    Ho & Salimans 2022 (arXiv:2207.12598).
    """

    def denoiser(z: Tensor, level: float) -> Tensor:
        without = unconditional(z, level)
        return without + scale * (conditional(z, level) - without)

    return denoiser


def _steps(
    levels: Sequence[float], path: Path
) -> list[tuple[float, float, tuple[float, float], tuple[float, float]]]:
    """Two levels and their a and s, of each step."""
    descending = all(map(math.isfinite, levels)) and all(x > y for x, y in pairwise(levels))
    points = [at(path, level) for level in levels] if descending else []
    if not points or not points[0][0] >= 0 or not points[-1][1] > 0:
        raise ValueError(f"levels must be descending and on the path, got {list(levels)}")
    return [(*pair, *ends) for pair, ends in zip(pairwise(levels), pairwise(points), strict=True)]
