import math

import pytest
import torch

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import (
    EDM,
    X0,
    Epsilon,
    Flow,
    Velocity,
    log_level,
    straight,
    variance_exploding,
    variance_preserving,
)

SIGMA_DATA = 0.5
SIGMA = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
SHARE = torch.tensor([0.01, 0.5, 0.97], dtype=torch.float64)
ROWS = [
    (EDM(SIGMA_DATA), SIGMA),
    (EDM(1.7), SIGMA),
    (Flow(), SHARE),
    (Velocity(), SHARE),
    (Epsilon(), SHARE),
    (X0(), SHARE),
    (Epsilon(variance_exploding), SIGMA),
    (X0(straight), SHARE),
]
rows = pytest.mark.parametrize(("prediction", "level"), ROWS)


@rows
def test_the_target_stands_for_the_clean_sample_at_every_level(prediction, level):
    z0, noise = torch.randn(2, 3, dtype=torch.float64)
    (a, s), (alpha, beta) = prediction.path(level), prediction.target(level)
    of_z, of_F = prediction.estimate(level)
    estimate = of_z * (a * z0 + s * noise) + of_F * (alpha * z0 + beta * noise)
    torch.testing.assert_close(estimate, z0)


@rows
def test_the_input_is_the_noisy_sample_times_one_number(prediction, level):
    (a, s), (p, q) = prediction.path(level), prediction.input(level)
    torch.testing.assert_close(p * s, q * a)
    assert (p > 0).all()


@rows
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3,)])
def test_coefficients_have_the_shape_and_dtype_of_the_level(prediction, level, shape):
    level = level.float().view(shape)
    methods = prediction.path, prediction.input, prediction.target, prediction.estimate
    for coefficient in (c for method in methods for c in method(level)):
        assert coefficient.shape == shape and coefficient.dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [SIGMA_DATA, 1.7])
def test_edm_reads_and_predicts_unit_variance(sigma_data):
    # the variance of z0 is sigma_data**2, and that of the noise is 1
    for pair in (EDM(sigma_data).input(SIGMA), EDM(sigma_data).target(SIGMA)):
        variance = (pair[0] * sigma_data) ** 2 + pair[1] ** 2
        torch.testing.assert_close(variance, torch.ones_like(SIGMA))


@pytest.mark.parametrize(
    ("prediction", "level", "inputs", "target", "estimate"),
    [
        # Karras et al. 2022, table 1, at sigma = sigma_data = 1/2
        (EDM(0.5), 0.5, (2**0.5, 0.5**0.5), (2**0.5, -(0.5**0.5)), (0.5, 0.5 / 2**0.5)),
        # at s = 0.6 a is 0.8, but for the straight path's 0.4
        (Flow(), 0.6, (0.4, 0.6), (-1, 1), (1, -0.6)),
        (Velocity(), 0.6, (0.8, 0.6), (-0.6, 0.8), (0.8, -0.6)),
        (Epsilon(), 0.6, (0.8, 0.6), (0, 1), (1.25, -0.75)),
        (X0(), 0.6, (0.8, 0.6), (1, 0), (0, 1)),
    ],
)
def test_rows_are_those_of_the_table(prediction, level, inputs, target, estimate):
    level = torch.tensor([level], dtype=torch.float64)
    assert [x.item() for x in prediction.input(level)] == pytest.approx(inputs)
    assert [x.item() for x in prediction.target(level)] == pytest.approx(target)
    assert [x.item() for x in prediction.estimate(level)] == pytest.approx(estimate)
    assert log_level(level).item() == pytest.approx(math.log(level) / 4)


def test_a_path_of_constant_variance_has_variance_one():
    a, s = variance_preserving(SHARE)
    torch.testing.assert_close(a.square() + s.square(), torch.ones_like(SHARE))


def test_the_weight_undoes_the_scale_of_the_estimate():
    product = LogNormal().weight(SIGMA, SIGMA_DATA) * EDM(SIGMA_DATA).estimate(SIGMA)[1] ** 2
    torch.testing.assert_close(product, torch.ones_like(SIGMA))


def test_mean_weights_are_the_published_ones():
    prior = LogNormal()
    for num_blocks, expected in [(3, [5.37, 17.0, 556.5]), (4, [4.83, 9.61, 30.7, 726.8])]:
        means = [prior.mean_weight(i, SIGMA_DATA) for i in prior.intervals(num_blocks)]
        assert means == pytest.approx(expected, rel=3e-3)
