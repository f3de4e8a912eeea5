"""The arithmetic of one element where it is more exact than what the ops are compared with."""

import math

import numpy as np
import pytest
import torch

from dbkernels.ops import _maths


def test_logarithm_is_right_to_its_last_places():
    near_one = [1 - k * 2.0**-24 for k in range(40)]
    numbers = [*(2.0**-k for k in range(34)), *near_one, math.sqrt(0.5), math.sqrt(0.5) - 1e-7]
    numbers += [(word + 0.5) * 2.0**-32 for word in torch.randint(2**32, (3000,)).tolist()]
    for u in map(float, np.float32(numbers)):
        exact = math.log(u)
        assert abs(_maths.logarithm(u) - exact) <= 1.5 * np.spacing(np.float32(abs(exact))), u
    assert _maths.logarithm(1.0) == 0


# a coefficient that is small, great, negative and none
@pytest.mark.parametrize("a", [0.0, 1.0, -0.002, 80.0])
@pytest.mark.parametrize("b", [0.0, -1.0, 0.5, 80.0])
def test_the_noisy_target_and_the_error_round_little(a, b):
    a, b = np.float32([a, b]).tolist()
    for prediction, z0, noise in (2 + 3 * torch.randn(50, 3)).tolist():
        exact, scale = a * z0 + b * noise, abs(a * z0) + abs(b * noise)
        assert abs(_maths.noised(z0, noise, a, b) - exact) <= 1.2e-7 * scale
        assert a != 1 or _maths.noised(z0, noise, a, b) == np.float32(exact)
        e = _maths.score_error(a, b, prediction, z0, noise, True)
        assert abs(e - (prediction - exact)) <= 2.4e-7 * (scale + abs(prediction))


def test_a_uniform_is_exact_to_its_ends():
    assert _maths.uniform(0, 0) == 2.0**-54 and _maths.uniform(2**32 - 1, 2**32 - 1) == 1


def test_the_loss_of_a_sample_is_rounded_once():
    total, elements = float(2**40 + 1), 2**34
    assert _maths.sample_loss(total, elements) == np.float32(total / elements)
    assert math.isinf(_maths.sample_loss(math.inf, 3))
