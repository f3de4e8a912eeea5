"""The arithmetic of philox.h, one number at a time, against known answers and float64."""

import math

import numpy as np
import pytest

from dbkernels.ops import _maths
from dbkernels.ops._noise import NOISE, SIGMA, counter_words, key_words
from dbkernels.ops._philox import philox

LAST = 2**32 - 1
# Random123, kat_vectors: philox 4x32, 10 rounds: counter, key, words
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([LAST] * 4, [LAST] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# a word, and what lies about each multiple of an eighth of its range
WORDS = [0, 1, 2**24 + 1, 0xDEADBEEF, LAST] + [
    eighth * 2**29 + offset for eighth in range(1, 8) for offset in (-300, -1, 0, 1, 300)
]


def random_words(count):
    return np.random.default_rng(0).integers(2**32, size=count).tolist()


def exact_pair(x0, x1):
    """By the formula in float64, of words that float32 has rounded."""
    u = np.float32(np.float32(x0) * np.float32(2.0**-32) + np.float32(2.0**-33))
    a = float(np.float32(x1) * np.float32(2 * math.pi * 2.0**-32))
    r = math.sqrt(-2 * math.log(float(u)))
    return r * math.cos(a), r * math.sin(a)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert list(_maths.philox(*counter, *key)) == words


def test_words_are_those_of_plain_torch():
    numbers = random_words(600)
    for i in range(0, 600, 6):
        assert _maths.philox(*numbers[i : i + 6]) == philox(*numbers[i : i + 6])


@pytest.mark.parametrize("step", [0, 1, LAST, 2**32, 2**55 + 3, 2**56 - 1])
@pytest.mark.parametrize("stream", [NOISE, SIGMA])
@pytest.mark.parametrize(("seed", "sample"), [(0, 0), (-1, LAST), (-(2**63) + 5, 2**31), (7, 9)])
def test_words_of_a_draw(seed, step, sample, stream):
    expected = sample, *counter_words(step, stream), *key_words(seed)
    assert _maths.draw_words(seed, step, sample, stream) == expected


def test_logarithm_is_right_to_its_last_places():
    near_one = [1 - k * 2.0**-24 for k in range(40)]
    numbers = [*(2.0**-k for k in range(34)), *near_one, math.sqrt(0.5), math.sqrt(0.5) - 1e-7]
    numbers += [(word + 0.5) * 2.0**-32 for word in WORDS + random_words(3000)]
    for u in map(float, np.float32(numbers)):
        exact = math.log(u)
        assert abs(_maths.logarithm(u) - exact) <= 1.5 * np.spacing(np.float32(abs(exact))), u
    assert _maths.logarithm(1.0) == 0


def test_angles_are_as_near_as_the_library_s():
    for word in WORDS + random_words(3000):
        a = float(np.float32(word) * np.float32(2 * math.pi * 2.0**-32))
        cos, sin = _maths.cos_sin(a)
        assert abs(cos - math.cos(a)) < 1.2e-7 and abs(sin - math.sin(a)) < 1.2e-7, word


def test_pairs_of_normals_are_those_of_the_formula():
    numbers = random_words(6000)
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    pairs += [(x0, x1) for x0 in (0, 1, 300, 2**31, LAST - 200, LAST) for x1 in WORDS]
    for x0, x1 in pairs:
        actual, exact = _maths.pair_of_normals(x0, x1), exact_pair(x0, x1)
        assert max(abs(a - b) for a, b in zip(actual, exact, strict=True)) < 1e-6, (x0, x1)


def test_no_normal_exceeds_that_of_the_word_0():
    assert _maths.pair_of_normals(0, 0)[0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert _maths.pair_of_normals(LAST, 0) == (0, 0)


def test_uniforms_are_exact():
    numbers = WORDS + random_words(len(WORDS))
    for x0, x1 in zip(numbers, reversed(numbers), strict=True):
        assert _maths.uniform(x0, x1) == ((x0 >> 5) * 2**26 + (x1 >> 6) + 0.5) * 2.0**-53
    assert _maths.uniform(0, 0) == 2.0**-54 and _maths.uniform(LAST, LAST) == 1
