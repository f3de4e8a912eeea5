"""What a network F predicts, as coefficients of the noisy sample, the clean one and the noise.

    z        = a z0 + s noise                      the noisy sample on a `Path` at a level
    input    = p z0 + q noise                      what the network reads
    target   = alpha z0 + beta noise               what F is asked for
    estimate = of_z z + of_F F                     the clean sample that F stands for

    prediction   p, q            alpha, beta          of_z, of_F              1 / of_F**2
    EDM          1 / r, s / r    s / (sd r), -sd / r  sd**2 / r**2, s sd / r  1 / sd**2 + x**2
    velocity     1 - t, t        -1, 1                1, -t                   1 + 2 x + x**2
    v            a, s            -s, a                a, -s                   1 + x**2
    epsilon      a, s            0, 1                 1 / a, -s / a           x**2
    x0           a, s            1, 0                 0, 1                    1

with r = sqrt(s**2 + sd**2), sd the standard deviation of the clean sample, and x = a / s. EDM:
Karras et al. 2022 (arXiv:2206.00364), table 1, where a = 1 and s = sigma. Velocity: of the straight
path, a = 1 - t and s = t. v: Salimans & Ho 2022 (arXiv:2202.00512), where a**2 + s**2 = 1. An error
of F is an error of the estimate over of_F, whatever the row; so the last column is the weight of
the estimate's squared error that makes it one of F.

Every method takes a level of any shape and returns tensors of that shape, in its dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dbkernels.diffusion.path import EXPLODING, PRESERVING, STRAIGHT, Pair, Path
from dbkernels.settings import check_choice

Powers = tuple[float, float, float]
PredictionName = Literal["edm", "velocity", "v", "epsilon", "x0"]


class Prediction(Protocol):
    """A row of the table above.

    path:    that the noisy sample is on
    powers:  the last column, as coefficients of 1, x and x**2
    """

    @property
    def path(self) -> Path: ...

    @property
    def powers(self) -> Powers: ...

    def input(self, level: Tensor) -> Pair:
        """p, q: the network reads p z0 + q noise."""

    def scale(self, level: Tensor) -> Tensor:
        """p / a: the network reads z times this number."""

    def target(self, level: Tensor) -> Pair:
        """alpha, beta: F is asked for alpha z0 + beta noise."""

    def estimate(self, level: Tensor) -> Pair:
        """of_z, of_F: the clean sample is of_z z + of_F F."""


@dataclass(frozen=True)
class EDM:
    """Input and target of unit variance at every sigma, for a clean sample of `sigma_data`."""

    sigma_data: float
    """Standard deviation of the clean sample."""
    path: ClassVar[Path] = EXPLODING

    @property
    def powers(self) -> Powers:
        """1 / sd**2, 0 and 1."""
        return self.sigma_data**-2, 0.0, 1.0

    def input(self, level: Tensor) -> Pair:
        """1 / r and sigma / r."""
        scale = self.scale(level)
        return scale, level * scale

    def scale(self, level: Tensor) -> Tensor:
        """1 / r, c_in of table 1."""
        return (level.square() + self.sigma_data**2).rsqrt()

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

    path: Path = PRESERVING
    """That the noisy sample is on."""

    def input(self, level: Tensor) -> Pair:
        """a and s."""
        return self.path(level)

    def scale(self, level: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(level)


@dataclass(frozen=True)
class Velocity(_Unscaled):
    """The velocity of the straight path, noise - z0."""

    path: Path = STRAIGHT
    powers: ClassVar[Powers] = 1.0, 2.0, 1.0

    def target(self, level: Tensor) -> Pair:
        """-1 and 1."""
        return -torch.ones_like(level), torch.ones_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """1 and -t."""
        return torch.ones_like(level), -level


class V(_Unscaled):
    """a noise - s z0, on a path of constant variance."""

    powers: ClassVar[Powers] = 1.0, 0.0, 1.0

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

    powers: ClassVar[Powers] = 0.0, 0.0, 1.0

    def target(self, level: Tensor) -> Pair:
        """0 and 1."""
        return torch.zeros_like(level), torch.ones_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """1 / a and -s / a."""
        a, s = self.path(level)
        return 1 / a, -s / a


class X0(_Unscaled):
    """The clean sample."""

    powers: ClassVar[Powers] = 1.0, 0.0, 0.0

    def target(self, level: Tensor) -> Pair:
        """1 and 0."""
        return torch.ones_like(level), torch.zeros_like(level)

    def estimate(self, level: Tensor) -> Pair:
        """0 and 1."""
        return torch.zeros_like(level), torch.ones_like(level)


# what a network may predict on each path, the usual one first. Unscaled, a network would read a
# sigma of 80 as it is; and at t = 1 a straight path has nothing left of z0 that epsilon tells.
PREDICTIONS: dict[str, dict[str, Callable[[float], Prediction]]] = {
    "gaussian": {"edm": EDM},
    "flow": {"velocity": lambda _: Velocity(), "x0": lambda _: X0(STRAIGHT)},
    "vp": {"epsilon": lambda _: Epsilon(), "v": lambda _: V(), "x0": lambda _: X0()},
}


def prediction_named(process: str, prediction: str, sigma_data: float) -> Prediction:
    """What a network predicts, by the names of a process and of a prediction.

    Args:
        process:     a key of PREDICTIONS
        prediction:  one of those that it has
        sigma_data:  standard deviation of the clean sample
    Raises:
        ValueError: there is no such process, or it has no such prediction.
    """
    check_choice("process", process, PREDICTIONS)
    check_choice(f"prediction of {process}", prediction, PREDICTIONS[process])
    return PREDICTIONS[process][prediction](sigma_data)
