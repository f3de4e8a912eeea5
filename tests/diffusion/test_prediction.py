import math

import numpy as np
import pytest
import torch

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.path import EXPLODING, PRESERVING, STRAIGHT, at, log_level
from dbkernels.diffusion.prediction import (
    EDM,
    PREDICTIONS,
    X0,
    Epsilon,
    V,
    Velocity,
    prediction_named,
)

SIGMA_DATA = 0.5
SIGMA = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
TIME = torch.tensor([0.01, 0.5, 0.97], dtype=torch.float64)
STEP = torch.tensor([0.0, 300.0, 999.0], dtype=torch.float64)
ROWS = [
    (EDM(SIGMA_DATA), SIGMA),
    (EDM(1.7), SIGMA),
    (Velocity(), TIME),
    (V(), STEP),
    (Epsilon(), STEP),
    (X0(), STEP),
    (Epsilon(EXPLODING), SIGMA),
    (X0(STRAIGHT), TIME),
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
def test_the_input_is_the_noisy_sample_times_the_scale(prediction, level):
    (a, s), (p, q), scale = prediction.path(level), prediction.input(level), prediction.scale(level)
    torch.testing.assert_close((p, q), (scale * a, scale * s))
    assert (scale > 0).all()


@rows
def test_the_powers_are_those_of_the_inverse_square_of_what_an_error_is_multiplied_by(
    prediction, level
):
    a, s = prediction.path(level)
    weight = sum(c * (a / s) ** k for k, c in enumerate(prediction.powers))
    torch.testing.assert_close(weight * prediction.estimate(level)[1] ** 2, torch.ones_like(level))


@rows
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3,)])
def test_coefficients_have_the_shape_and_dtype_of_the_level(prediction, level, shape):
    exact, level = level.view(shape), level.float().view(shape)
    methods = prediction.path, prediction.input, prediction.target, prediction.estimate
    for method in methods:
        for coefficient, expected in zip(method(level), method(exact), strict=True):
            assert coefficient.shape == shape and coefficient.dtype == torch.float32
            torch.testing.assert_close(coefficient.double(), expected, rtol=3e-6, atol=0)
    for number in (prediction.scale(level), prediction.path.condition(level)):
        assert number.shape == shape and number.dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [SIGMA_DATA, 1.7])
def test_edm_reads_and_predicts_unit_variance(sigma_data):
    # the variance of z0 is sigma_data**2, and that of the noise is 1
    for pair in (EDM(sigma_data).input(SIGMA), EDM(sigma_data).target(SIGMA)):
        variance = (pair[0] * sigma_data) ** 2 + pair[1] ** 2
        torch.testing.assert_close(variance, torch.ones_like(SIGMA))


A, S = 0.49761381201678034**0.5, 0.5023861879832197**0.5  # of 260 factors


@pytest.mark.parametrize(
    ("prediction", "level", "inputs", "target", "estimate"),
    [
        # Karras et al. 2022, table 1, at sigma = sigma_data = 1/2
        (EDM(0.5), 0.5, (2**0.5, 0.5**0.5), (2**0.5, -(0.5**0.5)), (0.5, 0.5 / 2**0.5)),
        (Velocity(), 0.6, (0.4, 0.6), (-1, 1), (1, -0.6)),
        (V(), 259, (A, S), (-S, A), (A, -S)),
        (Epsilon(), 259, (A, S), (0, 1), (1 / A, -S / A)),
        (X0(), 259, (A, S), (1, 0), (0, 1)),
    ],
)
def test_rows_are_those_of_the_table(prediction, level, inputs, target, estimate):
    level = torch.tensor([level], dtype=torch.float64)
    assert [x.item() for x in prediction.input(level)] == pytest.approx(inputs)
    assert [x.item() for x in prediction.target(level)] == pytest.approx(target)
    assert [x.item() for x in prediction.estimate(level)] == pytest.approx(estimate)


def test_conditions_are_the_published_ones():
    level = torch.tensor([0.25])
    assert log_level(level).item() == pytest.approx(math.log(0.25) / 4)
    conditions = [path.condition(level).item() for path in (EXPLODING, STRAIGHT, PRESERVING)]
    assert conditions == [log_level(level).item(), 250, 0.25]


def test_the_schedule_is_the_product_of_what_each_step_leaves():
    # as facebookresearch/DiT computes it
    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    a, s = PRESERVING(torch.arange(1000, dtype=torch.float64))
    np.testing.assert_allclose(a.numpy() ** 2, product, rtol=1e-12)
    np.testing.assert_allclose(s.numpy() ** 2, 1 - product, rtol=1e-11)
    between = [at(PRESERVING, step)[0] for step in (7.0, 7.5, 8.0)]
    assert between[0] > between[1] > between[2]
    assert between[1] == pytest.approx((between[0] + between[2]) / 2, rel=1e-5)


def test_mean_weights_are_the_published_ones():
    prior = LogNormal()
    for num_blocks, expected in [(3, [5.37, 17.0, 556.5]), (4, [4.83, 9.61, 30.7, 726.8])]:
        means = [prior.mean_weight(i, EDM(SIGMA_DATA)) for i in prior.intervals(num_blocks)]
        assert means == pytest.approx(expected, rel=3e-3)


def test_a_prediction_is_found_by_its_name_on_the_path_of_its_process():
    paths = {"gaussian": EXPLODING, "flow": STRAIGHT, "vp": PRESERVING}
    for process, names in PREDICTIONS.items():
        for name in names:
            found = prediction_named(process, name, 0.7)
            assert found.path == paths[process] and type(found).__name__.lower() == name
    assert prediction_named("gaussian", "edm", 0.7) == EDM(0.7)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ve", "edm"), "process must be one of gaussian, flow, vp, got ve"),
        (("flow", "edm"), "prediction of flow must be one of velocity, x0, got edm"),
        (("flow", "epsilon"), "prediction of flow must be one of velocity, x0, got epsilon"),
        (("vp", "velocity"), "prediction of vp must be one of epsilon, v, x0, got velocity"),
        (("gaussian", "v"), "prediction of gaussian must be one of edm, got v"),
    ],
)
def test_rejects(names, message):
    with pytest.raises(ValueError, match=message):
        prediction_named(*names, 0.5)
