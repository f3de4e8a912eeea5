"""A noise process: which levels there are, how they are cut, drawn, spaced and weighted.

A level is a number: sigma of the Gaussian process, the time of a flow, a step of a schedule, or the
share of tokens that are masked. Whatever belongs to levels is asked of a `Process`; training,
sampling, evaluation and the dry run hold one and look no deeper.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dbkernels.diffusion.path import Path, at
from dbkernels.diffusion.prediction import Prediction
from dbkernels.ops.philox import Draw, uniforms

Scheme = Literal["equal_probability", "log_uniform", "linear"]
Spacing = Literal["cdf", "karras", "linear", "cosine"]
NoiseOrder = Literal["first", "deepest"]  # layers that meet the most noise


@dataclass(frozen=True)
class Interval:
    """Noise levels from `low` to `high`.

    low:   exclusive, except where it is the least level of all
    high:  inclusive; sigma in units of z, or a share of masked tokens
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"an interval needs low < high, got low {self.low} and high {self.high}"
            )


class Process(Protocol):
    """What training and sampling ask of a noise process.

    `LogNormal`, `Flow`, `Timesteps` and `Masked` are four. Each knows some of the schemes and of
    the spacings, and refuses the others.

    path:   that noisy samples are on; None where they are tokens
    close:  the spacing whose neighbouring levels are close all the way, which samplers of a higher
            order need
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def path(self) -> Path | None: ...

    @property
    def close(self) -> Spacing: ...

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

    def weight(self, level: Tensor, prediction: Prediction | None) -> Tensor:
        """Weight of the loss at a level, shape of level: of a squared error of z0 such that it is
        one of what the network predicts, or of the cross-entropies of masked tokens, for which
        nothing is asked of a prediction.
        """

    def mean_weight(self, interval: Interval, prediction: Prediction | None) -> float:
        """Mean of `weight` over the levels that training draws from an interval."""


class OnPath:
    """What the processes have in common whose noisy samples are on a path."""

    path: ClassVar[Path]

    def quantiles(self, draw: Draw, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """One uniform number for each sample, or for each of its tokens.

        Args:
            draw:    names them
            shape:   (B,) or (B, T)
            device:  of the result; it does not change a bit
        Returns:
            float64 in (0, 1].
        """
        return uniforms(draw, *shape, device=device)

    def start(self, noise: Tensor, level: float, sigma_data: float) -> Tensor:
        """The start of a sampler: a normal of the marginal's variance, (a sigma_data)**2 + s**2.

        Args:
            noise:       unit normal numbers
            level:       the first of the sampler
            sigma_data:  standard deviation of the clean target
        """
        a, s = at(self.path, level)
        return noise * ((a * sigma_data) ** 2 + s**2) ** 0.5

    def weight(self, level: Tensor, prediction: Prediction | None) -> Tensor:
        """1 / of_F**2 of a prediction at a level; of EDM it is lambda of its table 1."""
        assert prediction is not None
        a, s = self.path(level)
        constant, linear, square = prediction.powers
        return constant + linear * (a / s) + square * (a / s).square()


def tiled(levels: list[float], name: str, got: str) -> tuple[Interval, ...]:
    """Intervals between ascending levels, the most noise first.

    Args:
        levels:  both ends of the range, and the boundaries between
        name:    of the settings that are to blame where two levels are one in float32
        got:     their values
    Raises:
        ValueError: a block would have no level of its own in float32.
    """
    if not (np.diff(np.array(levels, dtype=np.float32)) > 0).all():
        raise ValueError(
            f"{name} must be large enough for {len(levels) - 1} blocks with levels of their own in "
            f"float32, got {got}"
        )
    return tuple(Interval(*pair) for pair in pairwise(levels))[::-1]


def check_gamma(gamma: float) -> None:
    """Refuse an overlap that is none.

    Raises:
        ValueError: gamma is negative or not finite.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}")


def check_inside(interval: Interval, whole: Interval) -> None:
    """Refuse an interval that leaves a range.

    Raises:
        ValueError: it does.
    """
    if interval.low < whole.low or interval.high > whole.high:
        raise ValueError(
            f"the interval must lie in [{whole.low}, {whole.high}], "
            f"got [{interval.low}, {interval.high}]"
        )


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
