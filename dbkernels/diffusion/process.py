"""A noise process: which levels there are, how they are cut, drawn, spaced and weighted.

A level is a number: sigma of the Gaussian process, or the share of tokens that are masked. Whatever
belongs to levels is asked of a `Process`; training, sampling, evaluation and the dry run hold one
and look no deeper.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dbkernels.ops.philox import Draw

Scheme = Literal["equal_probability", "log_uniform", "linear"]
Spacing = Literal["cdf", "karras", "cosine"]
NoiseOrder = Literal["first", "deepest"]  # layers that meet the most noise


@dataclass(frozen=True)
class Interval:
    """Noise levels from `low` to `high`.

    low:   exclusive, except where it is the least level of all
    high:  inclusive; sigma in units of z, or a share of masked tokens
    """

    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(
                f"an interval needs low < high, got low {self.low} and high {self.high}"
            )


class Process(Protocol):
    """What training and sampling ask of a noise process: `LogNormal` and `Masked` are two.

    Each knows some of the schemes and of the spacings, and refuses the others.
    """

    @property
    def range(self) -> Interval:
        """All levels."""

    def intervals(self, num_blocks: int, scheme: Scheme) -> tuple[Interval, ...]:
        """Cut the range into one interval for each block, the most noise first."""

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by a share of its width, cut to the range."""

    def quantiles(self, draw: Draw, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Quantiles of the levels of a training step, for `level_at`: float64 of a shape (B, ...).

        They depend on the samples' places in the draw, and not on how a batch is cut.
        """

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """Levels of an interval at quantiles u, float64 in [0, 1]: float32, shape of u.

        Uniform u give levels as training draws them; equally spaced u give its quantiles.
        """

    def grid(self, count: int, spacing: Spacing) -> list[float]:
        """Levels of a sampler, from the most noise to the least."""

    def start(self, noise: Tensor, level: float, sigma_data: float) -> Tensor:
        """A noisy sample at the first level of a sampler, from unit normal numbers.

        Masked tokens need none: all are masked, int64 in the shape of the numbers.
        """

    def weight(self, level: Tensor, sigma_data: float) -> Tensor:
        """Weight of the loss at a level, shape of level: of a squared error of z0, or of the
        cross-entropies of masked tokens.
        """

    def mean_weight(self, interval: Interval, sigma_data: float) -> float:
        """Mean of `weight` over the levels that training draws from an interval."""


def check_quantiles(u: Tensor) -> None:
    """Refuse quantiles that are not float64: float32 has 2**24 numbers in [0, 1), 0 among them.

    Raises:
        ValueError: u is not float64.
    """
    if u.dtype != torch.float64:
        raise ValueError(f"u must be torch.float64, got {u.dtype}")


def rounded_inside(levels: Tensor, interval: Interval) -> Tensor:
    """Levels of an interval in float32, each above `low` and up to `high`."""
    low, high = np.float32(interval.low), np.float32(interval.high)
    # compared as floats: numpy would round a float to float32 before it compares the two
    if float(low) <= interval.low:
        low = np.nextafter(low, np.float32(np.inf))
    if float(high) > interval.high:
        high = np.nextafter(high, np.float32(0))
    return levels.float().clamp(float(low), float(high))
