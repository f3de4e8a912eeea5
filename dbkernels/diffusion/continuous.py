"""What processes have in common whose levels have a density: a prior that is cut to a range.

Boundaries of equal probability: Shing et al. 2026 (arXiv:2506.14202), section 3.3.
"""

import math
from abc import ABC, abstractmethod

from scipy.special import log_ndtr, ndtr

from dbkernels.diffusion.process import Interval, OnPath, Scheme, tiled
from dbkernels.settings import check_choice, check_number

MOST_LEVELS = 10_000  # of a sampler
# of the uncut prior, below which its quantiles would be roundings of 0 and 1
LEAST_MASS = 1e-9
# standard deviations above the mean, from which on 1 - Phi has lost half of its digits in Phi
TAIL = 6.0


class Continuous(OnPath, ABC):
    """A process whose prior is made from a normal of `mean` and `std`, and cut to `range`."""

    mean: float
    std: float

    @property
    @abstractmethod
    def range(self) -> Interval:
        """All levels."""

    @abstractmethod
    def cdf(self, level: float) -> float:
        """Probability, under the uncut prior, of a level up to this one."""

    @abstractmethod
    def quantile(self, q: float) -> float:
        """The level whose `cdf` is q."""

    def mass(self, interval: Interval) -> float:
        """Share of the cut prior that an interval holds; 1 for the whole range."""
        return self._probability(interval) / self._probability(self.range)

    def at_mass(self, share: float) -> float:
        """The level below which the cut prior holds `share` of its mass."""
        whole = self.range
        # the ends are exact, where the round trip through the cdf would lose digits
        if share in (0.0, 1.0):
            return whole.high if share else whole.low
        q_low, q_high = self.cdf(whole.low), self.cdf(whole.high)
        return self.quantile(q_low + share * (q_high - q_low))

    def intervals(
        self, num_blocks: int, scheme: Scheme = "equal_probability"
    ) -> tuple[Interval, ...]:
        """Cut the range into one interval per block, the most noise first.

        Args:
            num_blocks:  how many
            scheme:      equal_probability gives each the same mass of the prior (section 3.3);
                         log_uniform the same width in the logarithm of the level; linear the same
                         width in the level
        Returns:
            num_blocks intervals that tile the range without gap or overlap.
        Raises:
            ValueError: num_blocks is not positive, the scheme is unknown, or the prior is so narrow
                that a block would have no level of its own in float32.
        """
        check_number("num_blocks", num_blocks, 1)
        low, high = self.range.low, self.range.high
        positions = {
            "equal_probability": self.at_mass,
            "log_uniform": lambda share: low * (high / low) ** share,
            "linear": lambda share: low + share * (high - low),
        }
        check_choice("scheme", scheme, positions)
        inner = [positions[scheme](b / num_blocks) for b in range(1, num_blocks)]
        got = f"std {self.std} with mean {self.mean}, from {low} to {high}"
        return tiled([low, *inner, high], "std and the range", got)

    def equal_steps(self, count: int) -> list[float]:
        """Levels of a sampler, from the most noise down, each step of the same mass of the prior.

        So all blocks of equal probability serve about equally often.
        """
        return [self.at_mass(i / (count - 1)) for i in reversed(range(count))]

    def check_mean_and_std(self) -> None:
        """Refuse a mean and a standard deviation that no normal has.

        Raises:
            ValueError: they are not finite, or std is not positive.
        """
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                "mean must be finite and std positive and finite, "
                f"got mean {self.mean} and std {self.std}"
            )

    def has_mass(self) -> bool:
        """Whether the range holds so much of the uncut prior that its quantiles can be told."""
        return self._probability(self.range) >= LEAST_MASS

    def _probability(self, interval: Interval) -> float:
        """Of an interval, under the uncut prior."""
        return self.cdf(interval.high) - self.cdf(interval.low)


def exponential_moments(mean: float, std: float, a: float, b: float) -> tuple[float, float]:
    """Means of exp(-x) and exp(-2 x) of x = mean + std * n, with n normal and cut to [a, b].

    E[exp(-k x)] = exp(k**2 std**2 / 2 - k mean) * (Phi(b + k std) - Phi(a + k std))
                   / (Phi(b) - Phi(a))
    """
    found = []
    for k in (1, 2):
        tilt = k**2 / 2 * std**2 - k * mean
        if a + k * std < TAIL:
            tilted = math.exp(tilt) * (ndtr(b + k * std) - ndtr(a + k * std))
        else:
            upper, lower = log_ndtr([-b - k * std, -a - k * std])
            tilted = math.exp(tilt + lower) * -math.expm1(upper - lower)
        found.append(float(tilted / (ndtr(b) - ndtr(a))))
    return found[0], found[1]
