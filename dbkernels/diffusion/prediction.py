"""What a network F predicts, as coefficients of the noisy sample, the clean one and the noise.

    z        = a z0 + s noise                      the noisy sample of a process at a level
    input    = p z0 + q noise                      what the network reads
    target   = alpha z0 + beta noise               what F is asked for
    estimate = of_z z + of_F F                     the clean sample that F stands for

    prediction   p, q                     alpha, beta                     of_z, of_F
    EDM          1 / r, s / r             s / (sd r), -sd / r             sd**2 / r**2, s sd / r
    flow         1 - t, t                 -1, 1                           1, -t
    velocity     a, s                     -s, a                           a, -s
    epsilon      a, s                     0, 1                            1 / a, -s / a
    x0           a, s                     1, 0                            0, 1

with r = sqrt(s**2 + sd**2), and sd the standard deviation of the clean sample. EDM: Karras et al.
2022 (arXiv:2206.00364), table 1, where a = 1 and s = sigma. Flow: a = 1 - t and s = t. Velocity:
Salimans & Ho 2022 (arXiv:2202.00512), where a**2 + s**2 = 1. An error of F is an error of the
estimate over of_F, whatever the row.

Every method takes a level of any shape and returns two tensors of that shape, in its dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Path = Callable[[Tensor], Pair]


class Prediction(Protocol):
    """A row of the table above."""

    def path(self, level: Tensor) -> Pair:
        """a, s: the noisy sample is a z0 + s noise."""

    def input(self, level: Tensor) -> Pair:
        """p, q: the network reads p z0 + q noise, which is p / a times the noisy sample."""

    def target(self, level: Tensor) -> Pair:
        """alpha, beta: F is asked for alpha z0 + beta noise."""

    def estimate(self, level: Tensor) -> Pair:
        """of_z, of_F: the clean sample is of_z z + of_F F."""


def variance_exploding(level: Tensor) -> Pair:
    """The Gaussian process, z0 + sigma noise; the level is sigma."""
    return torch.ones_like(level), level


def variance_preserving(level: Tensor) -> Pair:
    """sqrt(1 - s**2) z0 + s noise; the level is s, in [0, 1]."""
    return (1 - level.square()).sqrt(), level


def straight(level: Tensor) -> Pair:
    """The flow, (1 - t) z0 + t noise; the level is t, in [0, 1]."""
    return 1 - level, level


def log_level(level: Tensor) -> Tensor:
    """ln(sigma) / 4: what the condition of a layer is computed from; table 1, c_noise."""
    return torch.log(level) / 4


@dataclass(frozen=True)
class EDM:
    """Input and target of unit variance at every sigma, for a clean sample of `sigma_data`."""

    sigma_data: float
    """Standard deviation of the clean sample."""

    def path(self, level: Tensor) -> Pair:
        """1 and sigma."""
        return variance_exploding(level)

    def input(self, level: Tensor) -> Pair:
        """1 / r and sigma / r; the first is c_in of table 1."""
        scale = (level.square() + self.sigma_data**2).rsqrt()
        return scale, level * scale

    def target(self, level: Tensor) -> Pair:
        """sigma / (sd r) and -sd / r."""
        r = (level.square() + self.sigma_data**2).sqrt()
        return level / (self.sigma_data * r), -self.sigma_data / r

    def estimate(self, level: Tensor) -> Pair:
        """sd**2 / r**2 and sigma sd / r, c_skip and c_out of table 1."""
        square = level.square() + self.sigma_data**2
        return self.sigma_data**2 / square, level * self.sigma_data / square.sqrt()


@dataclass(frozen=True)
class _Unscaled:
    """A network that reads the noisy sample as it is."""

    path: Path = variance_preserving
    """Level -> a, s: `variance_exploding`, `variance_preserving` or `straight`."""

    def input(self, level: Tensor) -> Pair:
        """a and s."""
        return self.path(level)


@dataclass(frozen=True)
class Flow(_Unscaled):
    """The velocity of the straight path, noise - z0."""

    path: Path = straight

    def target(self, level: Tensor) -> Pair:
        """-1 and 1."""
        return -torch.ones_like(level), torch.ones_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """1 and -t."""
        return torch.ones_like(level), -level


class Velocity(_Unscaled):
    """a noise - s z0, on a path of constant variance."""

    def target(self, level: Tensor) -> Pair:
        """-s and a."""
        a, s = self.path(level)
        return -s, a

    def estimate(self, level: Tensor) -> Pair:
        """a and -s."""
        a, s = self.path(level)
        return a, -s


class Epsilon(_Unscaled):
    """The noise."""

    def target(self, level: Tensor) -> Pair:
        """0 and 1."""
        return torch.zeros_like(level), torch.ones_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """1 / a and -s / a."""
        a, s = self.path(level)
        return 1 / a, -s / a


class X0(_Unscaled):
    """The clean sample."""

    def target(self, level: Tensor) -> Pair:
        """1 and 0."""
        return torch.ones_like(level), torch.zeros_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """0 and 1."""
        return torch.zeros_like(level), torch.ones_like(level)
