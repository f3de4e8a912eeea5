"""The masked process of discrete tokens: at time t a token is kept with probability alpha(t).

    alpha(t) = 1 - eps - (1 - 2 eps) m(t),    m(t) = t,  or sin(pi t / 2) for the cosine schedule
    weight(t) = -alpha'(t) / (1 - alpha(t))

so that the integral of weight(t) times the cross-entropies of the masked tokens over [0, 1], and
(1 - alpha(0)) ln V for each token, bound a text's negative logarithm of likelihood.
Shi et al. 2024 (arXiv:2406.04329), MD4, whose code has the eps. Its cosine schedule is
alpha = 1 - cos(pi (1 - t) / 2), and m is how far alpha has fallen, accurate near 0, where the
weight is large. Blocks: arXiv:2506.14202, appendix D.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from dbkernels.diffusion.process import (
    Interval,
    Scheme,
    Spacing,
    check_quantiles,
    rounded_inside,
)
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.settings import check_choice, check_number

MaskSchedule = Literal["linear", "cosine"]

MASK = -1  # in the place of a token that is masked, whatever the vocabulary
GOLDEN = (math.sqrt(5) - 1) / 2
LEAST_EPS = 1e-9  # whose inverse, the greatest weight, may be squared in float32
MOST_PARTS = 10_000  # blocks, or levels of a sampler: float32 tells far more apart


@dataclass(frozen=True)
class Masked:
    """Tokens that are masked one by one: a `Process` whose levels are times from 0 to 1."""

    schedule: MaskSchedule = "linear"
    """How alpha falls: linear in time, or cosine, which masks sooner."""
    eps: float = 1e-4
    """Share of tokens that is masked at time 0, and that is kept at time 1."""

    def __post_init__(self):
        check_choice("schedule", self.schedule, get_args(MaskSchedule))
        if not LEAST_EPS <= self.eps < 0.5:
            raise ValueError(f"eps must be from {LEAST_EPS} to less than 0.5, got {self.eps}")

    @property
    def range(self) -> Interval:
        """All times; that of most masks is 1."""
        return Interval(0.0, 1.0)

    def masked(self, level: Tensor) -> Tensor:
        """1 - alpha, the probability that a token is masked, shape and dtype of level."""
        fallen = level if self.schedule == "linear" else torch.sin(level * (math.pi / 2))
        return fallen * (1 - 2 * self.eps) + self.eps

    def alpha(self, level: Tensor) -> Tensor:
        """The probability that a token is kept, shape and dtype of level."""
        return 1 - self.masked(level)

    def slope(self, level: Tensor) -> Tensor:
        """The derivative of alpha by time, shape and dtype of level."""
        angle = level * (math.pi / 2)
        rise = torch.ones_like(level) if self.schedule == "linear" else angle.cos() * (math.pi / 2)
        return rise * (2 * self.eps - 1)

    def mass_below(self, time: float) -> float:
        """m(time): how far alpha has fallen, as a share of its whole fall."""
        return time if self.schedule == "linear" else math.sin(time * (math.pi / 2))

    def at_mass(self, share: float) -> float:
        """The time at which alpha has fallen by a share of its whole fall."""
        # the ends are exact, where an arc sine and a rounded pi would lose digits
        if self.schedule == "linear" or share in (0.0, 1.0):
            return share
        return math.asin(share) / (math.pi / 2)

    def mass(self, interval: Interval) -> float:
        """Share of alpha's whole fall that an interval holds."""
        return self.mass_below(interval.high) - self.mass_below(interval.low)

    def masked_at(self, time: float) -> float:
        """1 - alpha of one time."""
        return self.mass_below(time) * (1 - 2 * self.eps) + self.eps

    def opening(self, time: float, following: float) -> float:
        """The probability that a token which is masked at a time is open at an earlier one."""
        return 1 - self.masked_at(following) / self.masked_at(time)

    def intervals(
        self, num_blocks: int, scheme: Scheme = "equal_probability"
    ) -> tuple[Interval, ...]:
        """Cut the times into one interval per block, the most masked first.

        Args:
            num_blocks:  how many
            scheme:      equal_probability gives each the same fall of alpha, and so the same share
                         of the bound where tokens have no context (appendix D); linear the same
                         time
        Returns:
            num_blocks intervals that tile the range without gap or overlap.
        Raises:
            ValueError: num_blocks is not from 1 to MOST_PARTS, or the scheme is another one:
                log_uniform has no sense where the least time is 0.
        """
        check_number("num_blocks", num_blocks, 1, MOST_PARTS)
        positions = {"equal_probability": self.at_mass, "linear": lambda share: share}
        check_choice("scheme of masked tokens", scheme, positions)
        levels = [positions[scheme](b / num_blocks) for b in range(num_blocks + 1)]
        return tuple(Interval(*pair) for pair in pairwise(levels))[::-1]

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own fall of alpha, cut to the range.

        Of K intervals of equal fall that is gamma / K in alpha. The paper does not say what its
        overlap is for masked tokens; times have no width in logarithms.

        Raises:
            ValueError: gamma is negative or not finite.
        """
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
        if gamma == 0:  # there and back through the sine, the ends would lose digits
            return interval
        more = gamma * self.mass(interval)
        low = self.at_mass(max(self.mass_below(interval.low) - more, 0.0))
        high = self.at_mass(min(self.mass_below(interval.high) + more, 1.0))
        return Interval(min(low, interval.low), max(high, interval.high))

    def quantiles(self, draw: Draw, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Where in an interval a step's levels lie: evenly spread, from one number of the step.

            u_i = (u + i (sqrt(5) - 1) / 2) mod 1

        MD4 spreads u + i / B over a batch of B. Here i is the place of a sample (or of a token,
        where each has a level) in the step's effective batch, and the fraction is the golden one:
        it spreads any number of places that follow each other, so that a sample's level is the same
        however the batch is cut over micro-batches and ranks. Each u_i alone is uniform.

        Args:
            draw:    names the number, and the first sample's place
            shape:   of the result, (B, ...)
            device:  of the result
        Returns:
            float64 in [0, 1).
        """
        each = math.prod(shape[1:])
        first = draw.sample * each
        places = torch.arange(first, first + math.prod(shape), dtype=torch.float64, device=device)
        u = uniforms(replace(draw, sample=0), 1, device=device)
        return (u + places * GOLDEN).frac().view(shape)

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """The times that divide an interval in the proportions u.

        Args:
            interval:  inside the range
            u:         (...) float64 in [0, 1]
        Returns:
            (...) float32, each above `low` and up to `high`.
        Raises:
            ValueError: the interval leaves the range, or u is not float64.
        """
        if interval.low < 0 or interval.high > 1:
            raise ValueError(
                f"the interval must lie in [0, 1], got [{interval.low}, {interval.high}]"
            )
        check_quantiles(u)
        return rounded_inside(interval.low + u * (interval.high - interval.low), interval)

    def grid(self, count: int, spacing: Spacing = "cdf") -> list[float]:
        """Times of a sampler, from 1 down; what is masked at the last one opens there.

        Args:
            count:    how many
            spacing:  cdf has the same fall of alpha between two times, so that about as many tokens
                      open at each; cosine opens few at first and more later, cos(pi i / (2 count)),
                      as MD4 does
        Raises:
            ValueError: count is not from 1 to MOST_PARTS, or the spacing is unknown.
        """
        check_number("levels", count, 1, MOST_PARTS)
        if spacing == "cdf":
            return [self.at_mass(i / count) for i in range(count, 0, -1)]
        if spacing != "cosine":
            raise ValueError(f"spacing of masked tokens must be cdf or cosine, got {spacing}")
        return [math.cos(math.pi / 2 * i / count) for i in range(count)]

    def start(self, noise: Tensor, level: float, sigma_data: float) -> Tensor:
        """The start of a sampler: every token masked, int64, shape of noise."""
        return torch.full_like(noise, MASK, dtype=torch.int64)

    def weight(self, level: Tensor, sigma_data: float) -> Tensor:
        """-alpha' / (1 - alpha), of the sum of masked cross-entropies; at most about 1 / eps."""
        return -self.slope(level) / self.masked(level)

    def mean_weight(self, interval: Interval, sigma_data: float) -> float:
        """Mean of `weight` over the times of one interval.

        ln(1 - alpha) has the weight as its derivative.
        """
        low, high = interval.low, interval.high
        return math.log(self.masked_at(high) / self.masked_at(low)) / (high - low)
