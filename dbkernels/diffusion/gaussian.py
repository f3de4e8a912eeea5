"""The Gaussian noise process, z = z0 + sigma * noise, and the log-normal prior over sigma.

    ln sigma ~ N(mean, std**2), cut to [sigma_min, sigma_max]
    q(sigma) = Phi((ln sigma - mean) / std),    sigma(q) = exp(mean + std * Phi^-1(q))

Karras et al. 2022 (arXiv:2206.00364), section 5. Boundaries of equal probability and the
overlap: Shing et al. 2026 (arXiv:2506.14202), section 3.3 and appendix C.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from dbkernels.diffusion.interval import Interval

Scheme = Literal["equal_probability", "log_uniform", "linear"]


@dataclass(frozen=True)
class LogNormal:
    """The prior over sigma."""

    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = 1.2
    """Standard deviation of ln sigma."""
    sigma_min: float = 0.002
    """Least level, in units of z."""
    sigma_max: float = 80.0
    """Greatest level, in units of z."""

    def __post_init__(self):
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean must be finite and std positive, got mean {self.mean} and std {self.std}"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "sigma_min and sigma_max must be finite with 0 < sigma_min < sigma_max, "
                f"got sigma_min {self.sigma_min} and sigma_max {self.sigma_max}"
            )

    @property
    def range(self) -> Interval:
        """All levels, from sigma_min to sigma_max."""
        return Interval(self.sigma_min, self.sigma_max)

    def cdf(self, sigma: float) -> float:
        """Probability, under the uncut log-normal, of a level up to sigma."""
        return float(ndtr((math.log(sigma) - self.mean) / self.std))

    def quantile(self, q: float) -> float:
        """The level whose `cdf` is q."""
        return math.exp(self.mean + self.std * float(ndtri(q)))

    def mass(self, interval: Interval) -> float:
        """Share of the cut prior that an interval holds; 1 for the whole range."""
        whole = self.cdf(self.sigma_max) - self.cdf(self.sigma_min)
        return (self.cdf(interval.high) - self.cdf(interval.low)) / whole

    def at_mass(self, share: float) -> float:
        """The level below which the cut prior holds `share` of its mass."""
        # the ends are exact, where the round trip through the normal would lose digits
        if share in (0.0, 1.0):
            return self.sigma_max if share else self.sigma_min
        q_min, q_max = self.cdf(self.sigma_min), self.cdf(self.sigma_max)
        return self.quantile(q_min + share * (q_max - q_min))

    def intervals(
        self, num_blocks: int, scheme: Scheme = "equal_probability"
    ) -> tuple[Interval, ...]:
        """Cut the range into one interval per block, the most noise first.

        Args:
            num_blocks:  how many
            scheme:      equal_probability gives each the same mass of the prior (section 3.3);
                         log_uniform the same width in ln sigma; linear the same width in sigma
        Returns:
            num_blocks intervals that tile the range without gap or overlap.
        Raises:
            ValueError: num_blocks is not positive, or the scheme is unknown.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        low, high = self.sigma_min, self.sigma_max
        positions = {
            "equal_probability": self.at_mass,
            "log_uniform": lambda share: low * (high / low) ** share,
            "linear": lambda share: low + share * (high - low),
        }
        if scheme not in positions:
            raise ValueError(f"scheme must be one of {', '.join(positions)}, got {scheme}")
        inner = [positions[scheme](b / num_blocks) for b in range(1, num_blocks)]
        levels = [low, *inner, high]
        return tuple(Interval(*pair) for pair in pairwise(levels))[::-1]

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own width in ln sigma.

        alpha = (high / low)**gamma; [low / alpha, high * alpha], cut to the range (appendix C; the
        cut is the published code's).

        Raises:
            ValueError: gamma is negative or not finite.
        """
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
        alpha = (interval.high / interval.low) ** gamma
        return Interval(
            max(interval.low / alpha, self.sigma_min), min(interval.high * alpha, self.sigma_max)
        )


def sigma_at(prior: LogNormal, interval: Interval, u: Tensor) -> Tensor:
    """The inverse cdf of the prior cut to one interval.

    Args:
        prior:     over sigma
        interval:  inside the prior's range; units of z
        u:         (B,) float64 in [0, 1]; uniform numbers give levels from the cut prior
    Returns:
        (B,) float32, each above `low` and up to `high`.
    Raises:
        ValueError: the interval leaves the range, or u is not float64.
    """
    if interval.low < prior.sigma_min or interval.high > prior.sigma_max:
        raise ValueError(
            f"the interval must lie in [{prior.sigma_min}, {prior.sigma_max}], "
            f"got [{interval.low}, {interval.high}]"
        )
    # float32 has 2**24 numbers in [0, 1), of which 0 is one
    if u.dtype != torch.float64:
        raise ValueError(f"u must be torch.float64, got {u.dtype}")
    q_low, q_high = prior.cdf(interval.low), prior.cdf(interval.high)
    q = q_low + u * (q_high - q_low)
    sigma = torch.exp(prior.mean + prior.std * torch.special.ndtri(q))
    return sigma.float().clamp(_float32_above(interval.low), _float32_up_to(interval.high))


def _float32_above(level: float) -> float:
    """The least number of float32 that exceeds a level."""
    nearest = np.float32(level)
    # numpy would round a float to float32 before it compares the two
    return float(nearest if float(nearest) > level else np.nextafter(nearest, np.float32(np.inf)))


def _float32_up_to(level: float) -> float:
    """The greatest number of float32 that does not exceed a level."""
    nearest = np.float32(level)
    return float(nearest if float(nearest) <= level else np.nextafter(nearest, np.float32(0)))


def cdf_grid(prior: LogNormal, count: int) -> list[float]:
    """Levels from sigma_max down to sigma_min, equally spaced in probability.

    One inner step crosses the same mass everywhere, so that all blocks serve about equally often.

    Raises:
        ValueError: count is below 2.
    """
    _check_count(count)
    return [prior.at_mass(i / (count - 1)) for i in reversed(range(count))]


def karras_grid(prior: LogNormal, count: int, *, rho: float = 7.0) -> list[float]:
    """Levels from sigma_max down to sigma_min, equally spaced in sigma**(1 / rho).

    Karras et al. 2022, equation 5, without its last step to zero.

    Raises:
        ValueError: count is below 2, or rho is not positive.
    """
    _check_count(count)
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    high, low = prior.sigma_max ** (1 / rho), prior.sigma_min ** (1 / rho)
    inner = [(high + i / (count - 1) * (low - high)) ** rho for i in range(1, count - 1)]
    return [prior.sigma_max, *inner, prior.sigma_min]


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"a grid needs at least 2 levels, got {count}")
