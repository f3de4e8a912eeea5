"""Steps of a variance preserving schedule, whole numbers that are drawn evenly, as in DDPM.

Ho et al. 2020 (arXiv:2006.11239). The path and its schedule are `path.Preserving`; a level is a
step from 0 to STEPS - 1. An interval of steps has whole ends, of which the lower one is exclusive:
that of the least noise begins at -1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dbkernels.diffusion.continuous import MOST_LEVELS
from dbkernels.diffusion.path import PRESERVING, STEPS
from dbkernels.diffusion.prediction import Prediction
from dbkernels.diffusion.process import (
    Interval,
    OnPath,
    Scheme,
    Spacing,
    check_gamma,
    check_inside,
    check_quantiles,
    tiled,
)
from dbkernels.settings import check_choice, check_number

LAST = STEPS - 1
BEFORE = -1  # the first step


@dataclass(frozen=True)
class Timesteps(OnPath):
    """Steps of a variance preserving schedule, each as likely as any other: a `Process`."""

    path = PRESERVING
    close: ClassVar[Spacing] = "karras"

    @property
    def range(self) -> Interval:
        """All steps."""
        return Interval(BEFORE, LAST)

    def mass(self, interval: Interval) -> float:
        """Share of the steps that an interval holds."""
        return (math.floor(interval.high) - math.floor(interval.low)) / STEPS

    def intervals(
        self, num_blocks: int, scheme: Scheme = "equal_probability"
    ) -> tuple[Interval, ...]:
        """Cut the steps into one interval per block, the most noise first.

        Args:
            num_blocks:  how many
            scheme:      equal_probability and linear give each as many steps, or one more or less;
                         log_uniform the same width in ln(s / a)
        Returns:
            num_blocks intervals that tile the range without gap or overlap.
        Raises:
            ValueError: num_blocks is not from 1 to STEPS, the scheme is unknown, or a block would
                have no step.
        """
        check_number("num_blocks", num_blocks, 1, STEPS)
        positions = {"equal_probability": _evenly, "linear": _evenly, "log_uniform": _at_share}
        check_choice("scheme", scheme, positions)
        inner = [round(positions[scheme](b / num_blocks)) for b in range(1, num_blocks)]
        return tiled([BEFORE, *inner, LAST], "intervals", f"scheme {scheme}")

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by gamma times its own steps, cut to the range.

        Raises:
            ValueError: gamma is negative or not finite.
        """
        check_gamma(gamma)
        more = round(min(gamma * (interval.high - interval.low), STEPS))
        return Interval(max(interval.low - more, BEFORE), min(interval.high + more, LAST))

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """The steps of an interval at quantiles.

        Args:
            interval:  inside the range
            u:         (...) float64 in [0, 1]; uniform numbers give each step as often
        Returns:
            (...) float32, whole numbers above `low` and up to `high`.
        Raises:
            ValueError: the interval leaves the range or has no step, or u is not float64.
        """
        check_inside(interval, self.range)
        check_quantiles(u)
        low, high = math.floor(interval.low), math.floor(interval.high)
        if low == high:
            raise ValueError(
                f"the interval must have a step, got [{interval.low}, {interval.high}]"
            )
        return (low + torch.ceil(u * (high - low))).clamp(low + 1, high).float()

    def grid(self, count: int, spacing: Spacing = "cdf", *, rho: float = 7.0) -> list[float]:
        """Steps of a sampler, from the last down to 0.

        Args:
            count:    how many
            spacing:  cdf has whole steps, as far from each other as can be, as improved DDPM has
                      them (arXiv:2102.09672); karras is equal in (s / a)**(1 / rho), where steps
                      are no whole numbers
            rho:      of karras
        Raises:
            ValueError: count is below 2 or above the number of steps, the spacing is unknown, or
                rho is not positive.
        """
        check_number("levels", count, 2, STEPS if spacing == "cdf" else MOST_LEVELS)
        if spacing == "cdf":
            return [float(round(LAST * i / (count - 1))) for i in reversed(range(count))]
        if spacing != "karras":
            raise ValueError(f"spacing of steps must be cdf or karras, got {spacing}")
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        low, high = (math.exp(end / rho) for end in _log_ratios()[[0, -1]])
        inner = [rho * math.log(high + i / (count - 1) * (low - high)) for i in range(1, count - 1)]
        return [float(LAST), *np.interp(inner, _log_ratios(), np.arange(STEPS)).tolist(), 0.0]

    def mean_weight(self, interval: Interval, prediction: Prediction | None) -> float:
        """Mean of `weight` over the steps of one interval."""
        low, high = math.floor(interval.low), math.floor(interval.high)
        steps = torch.arange(low + 1, high + 1, dtype=torch.float64, device="cpu")
        return float(self.weight(steps, prediction).mean())


def _evenly(share: float) -> float:
    """The step below which a share of all lies."""
    return BEFORE + share * STEPS


def _at_share(share: float) -> float:
    """The step at a share of the way from the least ln(s / a) to the greatest."""
    ratios = _log_ratios()
    return float(np.interp(ratios[0] + share * (ratios[-1] - ratios[0]), ratios, np.arange(STEPS)))


def _log_ratios() -> np.ndarray:
    """ln(s / a) of every step, ascending."""
    a, s = Timesteps.path(torch.arange(STEPS, dtype=torch.float64, device="cpu"))
    return torch.log(s / a).numpy()
