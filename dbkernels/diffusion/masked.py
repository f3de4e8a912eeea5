"""The masked process of discrete tokens, whose level is the share of them that is masked.

At time t a token is kept with probability alpha(t), which falls from 1 - eps to eps:

    level = 1 - alpha(t) = eps + (1 - 2 eps) m(t),    m(t) = t,  or sin(pi t / 2) for cosine
    weight = -alpha'(t) / (1 - alpha(t))

so that the integral over [0, 1] of the weight times the cross-entropies of the masked tokens, and
(1 - alpha(0)) ln V for each token, bound a text's negative logarithm of likelihood.
Shi et al. 2024 (arXiv:2406.04329), MD4, whose code has the eps, and whose cosine schedule is
alpha = 1 - cos(pi (1 - t) / 2). Blocks: arXiv:2506.14202, appendix D.

Times say where training and samplers put their levels, and no more: a network that is told the
level masks by it, and needs to know no schedule.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dbkernels.diffusion.prediction import Prediction
from dbkernels.diffusion.process import (
    Interval,
    Scheme,
    Spacing,
    check_gamma,
    check_inside,
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
QUARTER = math.pi / 2


@dataclass(frozen=True)
class Masked:
    """Tokens that are masked one by one: a `Process` whose levels are shares of masked tokens."""

    path = None
    close: ClassVar[Spacing] = "cdf"

    schedule: MaskSchedule = "linear"
    """How the share of tokens that are kept falls with time; cosine masks more of them sooner."""
    eps: float = 1e-4
    """Share of tokens that is masked at time 0, and that is kept at time 1."""

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, get_args(MaskSchedule))
        if not LEAST_EPS <= self.eps < 0.5:
            raise ValueError(f"eps must be from {LEAST_EPS} to less than 0.5, got {self.eps}")

    @property
    def range(self) -> Interval:
        """All levels, those of times 0 to 1."""
        return Interval(self.at_mass(0.0), self.at_mass(1.0))

    def at_mass(self, share: float) -> float:
        """The level at which alpha has fallen by a share of its whole fall: m is the share."""
        return self.eps + (1 - 2 * self.eps) * share

    def mass_below(self, level: float) -> float:
        """How far alpha has fallen at a level, as a share of its whole fall."""
        return min(max((level - self.eps) / (1 - 2 * self.eps), 0.0), 1.0)

    def mass(self, interval: Interval) -> float:
        """Share of alpha's whole fall that an interval holds."""
        return self.mass_below(interval.high) - self.mass_below(interval.low)

    def at_time(self, time: float) -> float:
        """1 - alpha(time), the level there."""
        return self.at_mass(time if self.schedule == "linear" else math.sin(time * QUARTER))

    def time_of(self, level: float) -> float:
        """The time in [0, 1] at which the share of masked tokens is `level`."""
        share = self.mass_below(level)
        return share if self.schedule == "linear" else math.asin(share) / QUARTER

    def duration(self, interval: Interval) -> float:
        """Time that an interval of levels takes."""
        return self.time_of(interval.high) - self.time_of(interval.low)

    def intervals(
        self, num_blocks: int, scheme: Scheme = "equal_probability"
    ) -> tuple[Interval, ...]:
        """Cut the range into one interval per block, the most masked first.

        Args:
            num_blocks:  how many
            scheme:      equal_probability gives each the same fall of alpha, and so the same share
                         of the bound where tokens have no context (appendix D); linear the same
                         time
        Returns:
            num_blocks intervals that tile the range without gap or overlap.
        Raises:
            ValueError: num_blocks is not from 1 to MOST_PARTS, or the scheme is another one:
                log_uniform would give nearly all layers the least of the bound.
        """
        check_number("num_blocks", num_blocks, 1, MOST_PARTS)
        positions = {"equal_probability": self.at_mass, "linear": self.at_time}
        check_choice("scheme of masked tokens", scheme, positions)
        levels = [positions[scheme](b / num_blocks) for b in range(num_blocks + 1)]
        return tuple(Interval(*pair) for pair in pairwise(levels))[::-1]

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own fall of alpha, cut to the range.

        Of K intervals of equal fall that is gamma / K in alpha. The paper does not say what its
        overlap is for masked tokens; a width in logarithms would be endless for the last block.

        Raises:
            ValueError: gamma is negative or not finite.
        """
        check_gamma(gamma)
        more, whole = gamma * (interval.high - interval.low), self.range
        return Interval(max(interval.low - more, whole.low), min(interval.high + more, whole.high))

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
        """The levels at the times that divide an interval's in the proportions u.

        Args:
            interval:  inside the range
            u:         (...) float64 in [0, 1]; uniform numbers give times as MD4 draws them
        Returns:
            (...) float32, each above `low` and up to `high`.
        Raises:
            ValueError: the interval leaves the range, or u is not float64.
        """
        check_inside(interval, self.range)
        check_quantiles(u)
        time = self.time_of(interval.low) + u * self.duration(interval)
        share = time if self.schedule == "linear" else torch.sin(time * QUARTER)
        return rounded_inside(self.eps + (1 - 2 * self.eps) * share, interval)

    def grid(self, count: int, spacing: Spacing = "cdf") -> list[float]:
        """Levels of a sampler, from the greatest down; what is masked at the last opens there.

        Args:
            count:    how many
            spacing:  cdf has the same fall of alpha between two levels, so that about as many
                      tokens open at each; cosine has MD4's times cos(pi i / (2 count)), at which
                      few tokens open at first
        Raises:
            ValueError: count is not from 1 to MOST_PARTS, or the spacing is unknown.
        """
        check_number("levels", count, 1, MOST_PARTS)
        if spacing == "cdf":
            return [self.at_mass(i / count) for i in range(count, 0, -1)]
        if spacing != "cosine":
            raise ValueError(f"spacing of masked tokens must be cdf or cosine, got {spacing}")
        return [self.at_time(math.cos(QUARTER * i / count)) for i in range(count)]

    def start(self, noise: Tensor, level: float, sigma_data: float) -> Tensor:
        """The start of a sampler: every token masked, int64, shape of noise."""
        return torch.full_like(noise, MASK, dtype=torch.int64)

    def weight(self, level: Tensor, prediction: Prediction | None) -> Tensor:
        """-alpha' / (1 - alpha), of the sum of masked cross-entropies; at most about 1 / eps."""
        fall = 1 - 2 * self.eps
        if self.schedule == "linear":
            return fall / level
        share = (level - self.eps) / fall
        # the cosine of the angle whose sine is the share
        return (1 - share.square()).clamp_min(0).sqrt() * (fall * QUARTER) / level

    def mean_weight(self, interval: Interval, prediction: Prediction | None) -> float:
        """Mean of `weight` over the times of one interval.

        ln(1 - alpha) has the weight as its derivative by time.
        """
        return math.log(interval.high / interval.low) / self.duration(interval)
