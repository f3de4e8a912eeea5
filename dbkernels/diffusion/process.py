"""A noise process: which levels there are, how they are cut, drawn, spaced and weighted.

A level is a number: sigma of the Gaussian process, or a time in [0, 1]. Whatever belongs to levels
is asked of a `Process`; training, sampling, evaluation and the dry run hold one and look no deeper.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Scheme = Literal["equal_probability", "log_uniform", "linear"]
Spacing = Literal["cdf", "karras"]


@dataclass(frozen=True)
class Interval:
    """Noise levels from `low` to `high`.

    low:   exclusive, except where it is the least level of all
    high:  inclusive; sigma in units of z, or a time in [0, 1]
    """

    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(
                f"an interval needs low < high, got low {self.low} and high {self.high}"
            )


class Process(Protocol):
    """What training and sampling ask of a noise process; `LogNormal` is one."""

    @property
    def range(self) -> Interval:
        """All levels."""

    def intervals(self, num_blocks: int, scheme: Scheme) -> tuple[Interval, ...]:
        """Cut the range into one interval for each block, the most noise first."""

    def widen(self, interval: Interval, gamma: float) -> Interval:
        """Widen an interval on both sides by a share of its width, cut to the range."""

    def level_at(self, interval: Interval, u: Tensor) -> Tensor:
        """Levels of an interval at quantiles u, float64 in [0, 1]: float32, shape of u.

        Uniform u give levels as training draws them; equally spaced u give its quantiles.
        """

    def grid(self, count: int, spacing: Spacing) -> list[float]:
        """Levels of a sampler, from the most noise to the least."""

    def start(self, noise: Tensor, level: float, sigma_data: float) -> Tensor:
        """A noisy sample at the first level of a sampler, from unit normal numbers."""

    def weight(self, level: Tensor, sigma_data: float) -> Tensor:
        """Weight of a squared error of z0 at a level, shape of level."""

    def mean_weight(self, interval: Interval, sigma_data: float) -> float:
        """Mean of `weight` over the levels that training draws from an interval."""
