"""Flow matching, z = (1 - t) z0 + t noise, and the prior over its time t in (0, 1].

    logit_normal:  ln(u / (1 - u)) ~ N(mean, std**2)         uniform:  u ~ U(0, 1)
    t = shift u / (1 + (shift - 1) u),    that is    ln(t / (1 - t)) = ln(shift) + ln(u / (1 - u))

cut to [t_min, t_max]. Esser et al. 2024 (arXiv:2403.03206), section 3.1 for the logit-normal times
and equation 23 for their shift, which noises larger images more. Boundaries of equal probability as
in arXiv:2506.14202, section 3.3, which has them for a Gaussian process.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from scipy.special import expit, logit, ndtr, ndtri
from torch import Tensor

from dbkernels.diffusion.continuous import MOST_LEVELS, Continuous, exponential_moments
from dbkernels.diffusion.path import STRAIGHT
from dbkernels.diffusion.prediction import Prediction
from dbkernels.diffusion.process import (
    Interval,
    Spacing,
    check_gamma,
    check_inside,
    check_quantiles,
    rounded_inside,
)
from dbkernels.settings import check_choice, check_number

Density = Literal["logit_normal", "uniform"]

LEAST_TIME = 1e-6  # the inverse of whose square float32 has with digits to spare
MOST_SHIFT = 1e6


@dataclass(frozen=True)
class Flow(Continuous):
    """Flow matching: the prior over the time, a `Process`."""

    path = STRAIGHT
    close: ClassVar[Spacing] = "linear"

    mean: float = 0.0
    """Mean of ln(u / (1 - u)), of logit-normal times."""
    std: float = 1.0
    """Standard deviation of ln(u / (1 - u)), likewise."""
    density: Density = "logit_normal"
    """Of times before the shift: logit_normal as in SD3 and Flux, or uniform as in SiT."""
    time_shift: float = 1.0
    """By which times are moved towards the noise; 1 moves none. `sd3_shift` and `flux_shift` say
    what fits an image's size."""
    t_min: float = 0.001
    """Least time."""
    t_max: float = 1.0
    """Greatest time; at 1 nothing is left of the clean sample."""

    def __post_init__(self) -> None:
        check_choice("density", self.density, get_args(Density))
        self.check_mean_and_std()
        if self.density == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                "mean and std must be those of logit_normal times where density is uniform, which "
                f"has none, got mean {self.mean} and std {self.std}"
            )
        check_number("time_shift", self.time_shift, 1 / MOST_SHIFT, MOST_SHIFT)
        if not LEAST_TIME <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"t_min and t_max must have {LEAST_TIME} <= t_min < t_max <= 1, "
                f"got t_min {self.t_min} and t_max {self.t_max}"
            )
        if not self.has_mass():
            raise ValueError(
                f"mean, std and time_shift must put times between t_min {self.t_min} and t_max "
                f"{self.t_max}, got mean {self.mean}, std {self.std} and time_shift "
                f"{self.time_shift}"
            )

    @property
    def range(self) -> Interval:
        """All times, from t_min to t_max."""
        return Interval(self.t_min, self.t_max)

    def cdf(self, level: float) -> float:
        """Probability, under the uncut prior, of a time up to this one."""
        u = self._unshifted(level)
        return float(ndtr((logit(u) - self.mean) / self.std)) if self._is_normal else u

    def quantile(self, q: float) -> float:
        """The time whose `cdf` is q."""
        u = float(expit(self.mean + self.std * ndtri(q))) if self._is_normal else q
        return self._shifted(u)

    @property
    def _is_normal(self) -> bool:
        return self.density == "logit_normal"

    def _shifted(self, u: float) -> float:
        return self.time_shift * u / (1 + (self.time_shift - 1) * u)

    def _unshifted(self, time: float) -> float:
        return time / (self.time_shift + (1 - self.time_shift) * time)

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own width in t, cut to the range.

        A width in ln(t / (1 - t)), the Gaussian process's logarithm, is endless for a block that
        begins at t = 1.

        Raises:
            ValueError: gamma is negative or not finite.
        """
        check_gamma(gamma)
        more = gamma * (interval.high - interval.low)
        return Interval(max(interval.low - more, self.t_min), min(interval.high + more, self.t_max))

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """The inverse cdf of the prior cut to one interval.

        Args:
            interval:  inside the range
            u:         (...) float64 in [0, 1]; uniform numbers give times from the cut prior
        Returns:
            (...) float32, each above `low` and up to `high`.
        Raises:
            ValueError: the interval leaves the range, or u is not float64.
        """
        check_inside(interval, self.range)
        check_quantiles(u)
        q_low, q_high = self.cdf(interval.low), self.cdf(interval.high)
        # a sum that is rounded to above 1 has no quantile
        q = (q_low + u * (q_high - q_low)).clamp(max=1)
        if self._is_normal:
            q = torch.sigmoid(self.mean + self.std * torch.special.ndtri(q))
        return rounded_inside(self.time_shift * q / (1 + (self.time_shift - 1) * q), interval)

    def grid(self, count: int, spacing: Spacing = "cdf") -> list[float]:
        """Times of a sampler, from t_max down.

        Args:
            count:    how many
            spacing:  cdf crosses the same mass of the prior with each step and ends at t_min, so
                      that all blocks serve about equally often; linear is the published one, times
                      t_max, ..., 2 / count, 1 / count that are shifted
        Raises:
            ValueError: count is below 2 or above MOST_LEVELS, or as many as would go below t_min,
                or the spacing is unknown.
        """
        check_number("levels", count, 2, MOST_LEVELS)
        if spacing == "cdf":
            return self.equal_steps(count)
        if spacing != "linear":
            raise ValueError(f"spacing of a flow must be cdf or linear, got {spacing}")
        first = self._unshifted(self.t_max)
        check_number("levels", count, 2, int(first / self._unshifted(self.t_min)))
        return [self.t_max, *(self._shifted(first * i / count) for i in range(count - 1, 0, -1))]

    def mean_weight(self, interval: Interval, prediction: Prediction | None) -> float:
        """Mean of `weight` under the prior cut to one interval.

        a / s is (1 - t) / t = exp(-x) / shift, with x = ln(u / (1 - u)).
        """
        assert prediction is not None
        low, high = self._unshifted(interval.low), self._unshifted(interval.high)
        if self._is_normal:
            ends = ((float(logit(u)) - self.mean) / self.std for u in (low, high))
            first, second = exponential_moments(self.mean, self.std, *ends)
        else:
            # integrals of 1 / u - 1 and of its square
            width, ratio = high - low, math.log(high / low)
            first = ratio / width - 1
            second = 1 / (low * high) - 2 * ratio / width + 1
        constant, linear, square = prediction.powers
        return square * second / self.time_shift**2 + linear * first / self.time_shift + constant


def sd3_shift(tokens: int, base_tokens: int) -> float:
    """The time shift sqrt(tokens / base_tokens), of images of so many tokens.

    It keeps the uncertainty at a time that images of base_tokens had: arXiv:2403.03206, section
    5.3.2, where the count is of pixels; SD3 samples its images of 1024 x 1024 pixels with 3.
    """
    check_number("tokens", tokens, 1)
    check_number("base_tokens", base_tokens, 1)
    return math.sqrt(tokens / base_tokens)


def flux_shift(tokens: int) -> float:
    """The time shift of Flux's sampler: exp(mu), with mu from 0.5 at 256 tokens to 1.15 at 4096."""
    check_number("tokens", tokens, 1)
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
