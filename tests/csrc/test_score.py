"""The arithmetic of score.h, one element at a time, against float64."""

import math

import numpy as np
import pytest

from dbkernels.ops import _maths

SIGMA = [0.002, 0.05, 0.5, 7.0, 80.0]
DATA = [0.1, 0.5, 3.0]


def numbers(count):
    """Of float32, with a mean, so that a sign that is wrong shows."""
    return (2 + 3 * np.random.default_rng(0).standard_normal(count)).astype(np.float32).tolist()


def exact_row(sigma, k, sigma_data, r2):
    s = math.hypot(sigma, sigma_data)
    return sigma / (sigma_data * s), sigma_data / s, r2 * k


@pytest.mark.parametrize("sigma", np.float32(SIGMA).tolist())
def test_noised(sigma):
    for z0, noise in zip(numbers(50), numbers(60)[10:], strict=True):
        exact = z0 + sigma * noise
        assert _maths.noised(z0, sigma, noise) == np.float32(exact)


@pytest.mark.parametrize("sigma", np.float32(SIGMA).tolist())
@pytest.mark.parametrize("sigma_data", np.float32(DATA).tolist())
def test_what_a_sample_s_elements_share(sigma, sigma_data):
    assert _maths.c_in(sigma, sigma_data) == pytest.approx(1 / math.hypot(sigma, sigma_data), 2e-7)
    expected = exact_row(sigma, 1.5, sigma_data, 0.25)
    assert _maths.score_row(sigma, 1.5, sigma_data, 0.25) == pytest.approx(expected, 4e-7)


def test_a_level_of_zero_leaves_the_noise_to_be_guessed():
    assert _maths.score_row(0.0, 1.0, 0.5, 2.0) == (0, 1, 2)
    assert _maths.c_in(0.0, 0.5) == 2


@pytest.mark.parametrize("sigma", np.float32(SIGMA).tolist())
def test_the_error_is_that_of_the_denoiser(sigma):
    """c_out * e = D - z0, with D made of c_skip, c_out and z."""
    of_z0, of_noise, _ = _maths.score_row(sigma, 1.0, 0.5, 1.0)
    s2 = sigma**2 + 0.25
    c_skip, c_out = 0.25 / s2, sigma * 0.5 / math.sqrt(s2)
    for prediction, z0, noise in zip(*(numbers(n + 40)[n:] for n in (0, 10, 20)), strict=True):
        exact = (c_skip * (z0 + sigma * noise) + c_out * prediction - z0) / c_out
        scale = abs(prediction) + abs(of_z0 * z0) + abs(of_noise * noise)
        actual = _maths.score_error(of_z0, of_noise, prediction, z0, noise, True)
        assert abs(actual - exact) < 4e-7 * scale


def test_what_does_not_count_has_no_error():
    assert _maths.score_error(1.0, 2.0, 3.0, 4.0, 5.0, False) == 0
    assert _maths.score_error(1.0, 2.0, math.nan, math.inf, 5.0, False) == 0
    assert math.isnan(_maths.score_error(1.0, 2.0, math.nan, 4.0, 5.0, True))


def test_the_loss_of_a_sample_is_the_weighted_mean():
    assert _maths.sample_loss(10.0, 1.5, 4) == 3.75
    # what a float32 does not hold is rounded once, at the end
    total, elements = float(2**40 + 1), 2**34
    assert _maths.sample_loss(total, 3.0, elements) == np.float32(total * 3 / elements)
    assert math.isinf(_maths.sample_loss(math.inf, 1.0, 3))


def test_a_level_is_a_positive_number():
    assert [_maths.level_or_nan(sigma) for sigma in SIGMA] == pytest.approx(SIGMA)
    assert all(math.isnan(_maths.level_or_nan(s)) for s in (0.0, -1.0, math.inf, math.nan))
