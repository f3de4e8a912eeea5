"""The Gaussian noise process, z = z0 + sigma * noise, and the log-normal prior over sigma.

    ln sigma ~ N(mean, std**2), cut to [sigma_min, sigma_max]
    q(sigma) = Phi((ln sigma - mean) / std),    sigma(q) = exp(mean + std * Phi^-1(q))

Karras et al. 2022 (arXiv:2206.00364), section 5. Boundaries of equal probability and the
overlap: Shing et al. 2026 (arXiv:2506.14202), section 3.3 and appendix C.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from dbkernels.diffusion.continuous import MOST_LEVELS, Continuous, exponential_moments
from dbkernels.diffusion.path import EXPLODING
from dbkernels.diffusion.prediction import Prediction
from dbkernels.diffusion.process import (
    Interval,
    Spacing,
    check_gamma,
    check_inside,
    check_quantiles,
    rounded_inside,
)
from dbkernels.settings import check_number

LOG_MOST = math.log(np.finfo(np.float64).max)
LEAST_SIGMA, MOST_SIGMA = 1e-9, 1e9  # whose fourth powers float32 has


@dataclass(frozen=True)
class LogNormal(Continuous):
    """The Gaussian process: the prior over sigma, a `Process`."""

    path = EXPLODING
    close: ClassVar[Spacing] = "karras"

    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""
    sigma_min: float = 0.002
    """Least level, in units of z."""
    sigma_max: float = 80.0
    """Greatest level, in units of z."""

    def __post_init__(self) -> None:
        self.check_mean_and_std()
        if not LEAST_SIGMA <= self.sigma_min < self.sigma_max <= MOST_SIGMA:
            raise ValueError(
                f"sigma_min and sigma_max must have {LEAST_SIGMA} <= sigma_min < sigma_max <= "
                f"{MOST_SIGMA}, got sigma_min {self.sigma_min} and sigma_max {self.sigma_max}"
            )
        if not self.has_mass():
            raise ValueError(
                f"mean and std must put levels between sigma_min {self.sigma_min} and sigma_max "
                f"{self.sigma_max}, which are {math.log(self.sigma_min):.4g} and "
                f"{math.log(self.sigma_max):.4g} in ln sigma, got mean {self.mean} and std "
                f"{self.std}"
            )

    @property
    def range(self) -> Interval:
        """All levels, from sigma_min to sigma_max."""
        return Interval(self.sigma_min, self.sigma_max)

    def cdf(self, level: float) -> float:
        """Probability, under the uncut log-normal, of a sigma up to this one."""
        return float(ndtr((math.log(level) - self.mean) / self.std))

    def quantile(self, q: float) -> float:
        """The level whose `cdf` is q."""
        return math.exp(self.mean + self.std * float(ndtri(q)))

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own width in ln sigma.

        alpha = (high / low)**gamma; [low / alpha, high * alpha], cut to the range (appendix C; the
        cut is the published code's).

        Raises:
            ValueError: gamma is negative or not finite.
        """
        check_gamma(gamma)
        ratio = interval.high / interval.low
        # what float has no number for widens to the range too
        alpha = math.inf if gamma * math.log(ratio) > LOG_MOST else ratio**gamma
        return Interval(
            max(interval.low / alpha, self.sigma_min), min(interval.high * alpha, self.sigma_max)
        )

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """The inverse cdf of the prior cut to one interval.

        Args:
            interval:  inside the range; units of z
            u:         (...) float64 in [0, 1]; uniform numbers give levels from the cut prior
        Returns:
            (...) float32, each above `low` and up to `high`.
        Raises:
            ValueError: the interval leaves the range, or u is not float64.
        """
        check_inside(interval, self.range)
        check_quantiles(u)
        q_low, q_high = self.cdf(interval.low), self.cdf(interval.high)
        q = q_low + u * (q_high - q_low)
        sigma = torch.exp(self.mean + self.std * torch.special.ndtri(q))
        return rounded_inside(sigma, interval)

    def grid(self, count: int, spacing: Spacing = "cdf", *, rho: float = 7.0) -> list[float]:
        """Levels from sigma_max down to sigma_min.

        Args:
            count:    how many
            spacing:  cdf crosses the same mass of the prior with each step, so that all blocks
                      serve about equally often; karras is equal in sigma**(1 / rho), equation 5
                      of Karras et al. without its last step to zero
            rho:      of karras
        Raises:
            ValueError: count is below 2 or above MOST_LEVELS, the spacing is unknown, or rho is not
                positive.
        """
        check_number("levels", count, 2, MOST_LEVELS)
        if spacing == "cdf":
            return self.equal_steps(count)
        if spacing != "karras":
            raise ValueError(f"spacing must be cdf or karras, got {spacing}")
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        high, low = self.sigma_max ** (1 / rho), self.sigma_min ** (1 / rho)
        inner = [(high + i / (count - 1) * (low - high)) ** rho for i in range(1, count - 1)]
        return [self.sigma_max, *inner, self.sigma_min]

    def mean_weight(self, interval: Interval, prediction: Prediction | None) -> float:
        """Mean of `weight` under the prior cut to one interval; a / s is 1 / sigma."""
        ends = ((math.log(s) - self.mean) / self.std for s in (interval.low, interval.high))
        moments = exponential_moments(self.mean, self.std, *ends)
        assert prediction is not None
        constant, linear, square = prediction.powers
        return square * moments[1] + linear * moments[0] + constant
