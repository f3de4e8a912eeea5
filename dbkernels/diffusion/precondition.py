"""Preconditioning of a denoiser D around a network F, and the weight of its squared error.

    D(z, sigma) = c_skip * z + c_out * F(c_in * z, c_noise)
    weight      = 1 / c_out**2

Karras et al. 2022 (arXiv:2206.00364), table 1. Every function takes sigma of any shape, in units
of z, and returns that shape; sigma_data is the standard deviation of the clean target.
"""

import math

import torch
from scipy.special import ndtr
from torch import Tensor

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.interval import Interval


def c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    """sigma_data**2 / (sigma**2 + sigma_data**2)."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    """sigma * sigma_data / sqrt(sigma**2 + sigma_data**2)."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / sqrt(sigma**2 + sigma_data**2)."""
    return (sigma**2 + sigma_data**2).rsqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """ln(sigma) / 4, what the condition is computed from."""
    return torch.log(sigma) / 4


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(sigma**2 + sigma_data**2) / (sigma * sigma_data)**2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def mean_edm_weight(prior: LogNormal, interval: Interval, sigma_data: float) -> float:
    """Mean of `edm_weight` under the prior cut to one interval.

    The weight is sigma**-2 + sigma_data**-2, and for ln sigma = mean + std * n with n normal and
    cut to [a, b]:

        E[sigma**-2] = exp(2 std**2 - 2 mean) * (Phi(b + 2 std) - Phi(a + 2 std))
                       / (Phi(b) - Phi(a))
    """
    a, b = ((math.log(s) - prior.mean) / prior.std for s in (interval.low, interval.high))
    tilted = ndtr(b + 2 * prior.std) - ndtr(a + 2 * prior.std)
    inverse_square = math.exp(2 * prior.std**2 - 2 * prior.mean) * tilted / (ndtr(b) - ndtr(a))
    return float(inverse_square) + sigma_data**-2
