"""The arithmetic of one element: loads and stores, words, normals, errors and losses."""

import math
import struct

import numpy as np
import pytest
import torch

from dbkernels.ops import _maths
from dbkernels.ops.backend.noise_tile import LEVEL, NOISE
from dbkernels.ops.philox import counter_words, key_words

STORES = {"bfloat16": _maths.to_bfloat16, "float16": _maths.to_float16}
LOADS = {"bfloat16": _maths.from_bfloat16, "float16": _maths.from_float16}
PLACES = {"bfloat16": 16, "float16": 13}  # of float32 that a rounding drops
NAMES = sorted(STORES)


def bits_of(x):
    return x.view(torch.int16).int() & 0xFFFF


def float_of(bits):
    return struct.unpack("f", struct.pack("I", bits))[0]


def assert_stored(name, numbers):
    expected = bits_of(numbers.to(getattr(torch, name))).tolist()
    for x, y in zip(numbers.tolist(), expected, strict=True):
        assert STORES[name](x) == y, x.hex()


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_loaded_and_stored_again(name):
    bits = torch.arange(2**16)
    wide = bits.to(torch.int16).view(getattr(torch, name)).float()
    for y, x in zip(bits.tolist(), wide.tolist(), strict=True):
        loaded = LOADS[name](y)
        if math.isnan(x):
            assert math.isnan(loaded)
        else:
            assert (loaded, math.copysign(1, loaded)) == (x, math.copysign(1, x))
            assert STORES[name](x) == y


# halfway between two neighbours, and one bit of float32 to each side of it
@pytest.mark.parametrize("name", NAMES)
def test_rounds_to_nearest_and_halves_to_even(name):
    places = PLACES[name]
    kept = torch.arange(0, 2**31, (2**31 // 3001) >> places << places)[:, None]
    half = 2 ** (places - 1)
    bits = (kept + torch.tensor([0, 1, half - 1, half, half + 1])).flatten()
    bits = bits[bits <= 0x7F800000].int()
    numbers = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    assert_stored(name, numbers)
    # an odd neighbour below
    assert_stored(name, (bits[bits % 2**places == half] ^ 2**places).view(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_and_the_greatest(name):
    limits = torch.finfo(getattr(torch, name))
    unit = limits.tiny * limits.eps
    factors = [0.25, 0.5, 0.5 + 2**-20, 0.75, 1, 1.5, 2.5, 3.5, 1 / limits.eps - 0.5]
    numbers = [unit * f for f in factors]
    numbers += [limits.max, limits.max * (1 + limits.eps / 4), float_of(0x7F7FFFFF), math.inf, 0.0]
    numbers += [65503.9, 65519.99, 65520.0, 65535.9, 65536.0, 131072.0]
    numbers = torch.tensor(numbers)
    assert_stored(name, torch.cat([numbers, -numbers]))


# the first has its mark only in places that a store drops
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan(name, bits):
    assert math.isnan(LOADS[name](STORES[name](float_of(bits))))


@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32, 2**55 + 3, 2**56 - 1])
@pytest.mark.parametrize("stream", [NOISE, LEVEL])
@pytest.mark.parametrize(
    ("seed", "sample"), [(0, 0), (-1, 2**32 - 1), (-(2**63) + 5, 2**31), (7, 9)]
)
def test_words_of_a_draw(seed, step, sample, stream):
    expected = sample, *counter_words(step, stream), *key_words(seed)
    assert _maths.draw_words(seed, step, sample, stream) == expected


def test_logarithm_is_right_to_its_last_places():
    near_one = [1 - k * 2.0**-24 for k in range(40)]
    numbers = [*(2.0**-k for k in range(34)), *near_one, math.sqrt(0.5), math.sqrt(0.5) - 1e-7]
    numbers += [(word + 0.5) * 2.0**-32 for word in torch.randint(2**32, (3000,)).tolist()]
    for u in map(float, np.float32(numbers)):
        exact = math.log(u)
        assert abs(_maths.logarithm(u) - exact) <= 1.5 * np.spacing(np.float32(abs(exact))), u
    assert _maths.logarithm(1.0) == 0


def test_a_uniform_is_exact_to_its_ends():
    words = [0, 2**32 - 1, *torch.randint(2**32, (100,)).tolist()]
    for x0, x1 in zip(words, words[::-1], strict=True):
        assert _maths.uniform(x0, x1) == ((x0 >> 5) * 2**26 + (x1 >> 6) + 0.5) * 2.0**-53
    assert _maths.uniform(0, 0) == 2.0**-54 and _maths.uniform(2**32 - 1, 2**32 - 1) == 1


# a coefficient that is small, great, negative and none
@pytest.mark.parametrize("a", [0.0, 1.0, -0.002, 80.0])
@pytest.mark.parametrize("b", [0.0, -1.0, 0.5, 80.0])
def test_the_noisy_target_and_the_error_round_little(a, b):
    a, b = np.float32([a, b]).tolist()
    for prediction, z0, noise in (2 + 3 * torch.randn(50, 3)).tolist():
        exact, scale = a * z0 + b * noise, abs(a * z0) + abs(b * noise)
        assert abs(_maths.noised(z0, noise, a, b) - exact) <= 1.2e-7 * scale
        e = _maths.score_error(a, b, prediction, z0, noise, True)
        assert abs(e - (prediction - exact)) <= 2.4e-7 * (scale + abs(prediction))


def test_of_a_target_times_one_the_noise_is_rounded_once():
    for z0, noise in torch.randn(50, 2).tolist():
        assert _maths.noised(z0, noise, 1.0, 7.0) == np.float32(z0 + 7.0 * noise)


def test_what_does_not_count_has_no_error():
    assert _maths.score_error(1.0, 2.0, 3.0, 4.0, 5.0, False) == 0
    assert _maths.score_error(1.0, 2.0, math.nan, math.inf, 5.0, False) == 0
    assert math.isnan(_maths.score_error(1.0, 2.0, math.nan, 4.0, 5.0, True))


def test_the_loss_of_a_sample_is_the_mean():
    assert _maths.sample_loss(15.0, 4) == 3.75
    # what a float32 does not hold is rounded once, at the end
    total, elements = float(2**40 + 1), 2**34
    assert _maths.sample_loss(total, elements) == np.float32(total / elements)
    assert math.isinf(_maths.sample_loss(math.inf, 3))
