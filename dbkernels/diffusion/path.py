"""From clean to noise: the noisy sample at a level is a z0 + s noise.

    path         level        a, s                                the condition reads
    Exploding    sigma        1, sigma                            ln(sigma) / 4
    Straight     t in [0, 1]  1 - t, t                            1000 t
    Preserving   t in steps   sqrt(A(t)), sqrt(1 - A(t))          t

with A(t) = (1 - beta_0) (1 - beta_1) ... (1 - beta_t), and beta_i that grow evenly from BETA_FIRST
to BETA_LAST over STEPS steps. Exploding: Karras et al. 2022 (arXiv:2206.00364), whose c_noise is
that condition. Straight: Lipman et al. 2022 (arXiv:2210.02747), with the time in thousandths of
Esser et al. 2024 (arXiv:2403.03206). Preserving: Ho et al. 2020 (arXiv:2006.11239), DDPM, whose
steps Peebles & Xie 2023 (arXiv:2212.09748) took for their published weights.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
PathName = Literal["gaussian", "flow", "vp"]

STEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02
RISE = (BETA_LAST - BETA_FIRST) / (STEPS - 1)  # of beta from step to step


class Path(Protocol):
    """A row of the table above."""

    def __call__(self, level: Tensor) -> Pair:
        """a and s, both in the shape and dtype of the level."""

    def condition(self, level: Tensor) -> Tensor:
        """What the sinusoid of a network's condition is made of, in the shape of the level."""


def log_level(level: Tensor) -> Tensor:
    """ln(sigma) / 4: what the condition of a layer is computed from; table 1, c_noise."""
    return torch.log(level) / 4


@dataclass(frozen=True)
class Exploding:
    """z0 + sigma noise, the Gaussian process."""

    def __call__(self, level: Tensor) -> Pair:
        """1 and sigma."""
        return torch.ones_like(level), level

    def condition(self, level: Tensor) -> Tensor:
        """ln(sigma) / 4."""
        return log_level(level)


@dataclass(frozen=True)
class Straight:
    """(1 - t) z0 + t noise, the flow."""

    def __call__(self, level: Tensor) -> Pair:
        """1 - t and t."""
        return 1 - level, level

    def condition(self, level: Tensor) -> Tensor:
        """1000 t, for which the sinusoid's wavelengths are made."""
        return 1000 * level


@dataclass(frozen=True)
class Preserving:
    """The variance preserving path of DDPM: betas that grow linearly.

    A step is a whole number from 0 to STEPS - 1. Between two of them A is smooth: the product's
    logarithm is a sum of values of ln(1 - beta), which Euler and Maclaurin's formula gives without
    a loop or a table, to about 1e-13 in ln A.
    """

    def __call__(self, level: Tensor) -> Pair:
        """sqrt(A) and sqrt(1 - A), computed in float64."""
        log_A = _log_A(level.double())
        return (log_A / 2).exp().to(level.dtype), (-log_A.expm1()).sqrt().to(level.dtype)

    def condition(self, level: Tensor) -> Tensor:
        """The step itself."""
        return level


EXPLODING, STRAIGHT, PRESERVING = Exploding(), Straight(), Preserving()


def at(path: Path, level: float) -> tuple[float, float]:
    """a and s of one level, as numbers."""
    a, s = path(torch.tensor(level, dtype=torch.float64, device="cpu"))
    return a.item(), s.item()


def _log_A(step: Tensor) -> Tensor:
    """ln A in float64: the integral, half of both ends, a twelfth of the slopes' change."""
    first = torch.full_like(step, BETA_FIRST)
    beta = first + RISE * step
    integral = (_integral(beta) - _integral(first)) / RISE
    ends = (torch.log1p(-beta) + torch.log1p(-first)) / 2
    return integral + ends + RISE * (1 / (1 - first) - 1 / (1 - beta)) / 12


def _integral(beta: Tensor) -> Tensor:
    """Of ln(1 - beta), from 0."""
    return -(1 - beta) * torch.log1p(-beta) - beta
