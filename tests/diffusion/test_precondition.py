import numpy as np
import pytest
import torch

from dbkernels.diffusion.gaussian import LogNormal, sigma_at
from dbkernels.diffusion.precondition import (
    c_in,
    c_noise,
    c_out,
    c_skip,
    edm_weight,
    mean_edm_weight,
)

SIGMA = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
SIGMA_DATA = 0.5


def test_values_at_sigma_data():
    # Karras et al. 2022, table 1, at sigma = sigma_data = 1/2
    half = SIGMA[1:2]
    assert c_skip(half, SIGMA_DATA).item() == pytest.approx(0.5)
    assert c_out(half, SIGMA_DATA).item() == pytest.approx(0.5 / 2**0.5)
    assert c_in(half, SIGMA_DATA).item() == pytest.approx(2**0.5)
    assert c_noise(half).item() == pytest.approx(np.log(0.5) / 4)
    assert edm_weight(half, SIGMA_DATA).item() == pytest.approx(8.0)


def test_network_sees_unit_variance():
    variance = c_in(SIGMA, SIGMA_DATA) ** 2 * (SIGMA_DATA**2 + SIGMA**2)
    torch.testing.assert_close(variance, torch.ones_like(SIGMA))


def test_network_is_asked_for_unit_variance():
    # F must give (z0 - c_skip z) / c_out, whose variance is 1 for the chosen c_skip and c_out
    skip, out = c_skip(SIGMA, SIGMA_DATA), c_out(SIGMA, SIGMA_DATA)
    variance = ((1 - skip) ** 2 * SIGMA_DATA**2 + skip**2 * SIGMA**2) / out**2
    torch.testing.assert_close(variance, torch.ones_like(SIGMA))


def test_weight_undoes_the_output_scale():
    product = edm_weight(SIGMA, SIGMA_DATA) * c_out(SIGMA, SIGMA_DATA) ** 2
    torch.testing.assert_close(product, torch.ones_like(SIGMA))


def test_mean_weights_are_the_published_ones():
    prior = LogNormal()
    for num_blocks, expected in [(3, [5.37, 17.0, 556.5]), (4, [4.83, 9.61, 30.7, 726.8])]:
        means = [mean_edm_weight(prior, i, SIGMA_DATA) for i in prior.intervals(num_blocks)]
        assert means == pytest.approx(expected, rel=3e-3)


def test_mean_weight_is_the_mean_over_samples():
    prior = LogNormal()
    interval = prior.widen(prior.intervals(3)[1], 0.05)
    sigma = sigma_at(prior, interval, torch.rand(200_000, dtype=torch.float64))
    mean = edm_weight(sigma, SIGMA_DATA).mean().item()
    assert mean_edm_weight(prior, interval, SIGMA_DATA) == pytest.approx(mean, rel=5e-3)
