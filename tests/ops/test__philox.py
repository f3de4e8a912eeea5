import math

import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops import _philox
from dbkernels.ops._philox import (
    _cos_sin,
    _multiply,
    _pair_of_normals,
    normal_tile,
    normals_at,
    philox,
    philox_words,
)

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
# a word, and what lies about each multiple of a quarter of its range
WORDS = [0, 1, 2**24 + 1, 0xDEADBEEF, LAST] + [
    quarter * 2**29 + offset for quarter in range(1, 8) for offset in (-300, -1, 0, 1, 300)
]


@triton.jit
def _words_kernel(x_ptr, y_ptr):
    c0, c1 = tl.load(x_ptr).to(tl.uint32), tl.load(x_ptr + 1).to(tl.uint32)
    c2, c3 = tl.load(x_ptr + 2).to(tl.uint32), tl.load(x_ptr + 3).to(tl.uint32)
    k0, k1 = tl.load(x_ptr + 4).to(tl.uint32), tl.load(x_ptr + 5).to(tl.uint32)
    x0, x1, x2, x3 = philox_words(c0, c1, c2, c3, k0, k1)
    tl.store(y_ptr, x0.to(tl.int64))
    tl.store(y_ptr + 1, x1.to(tl.int64))
    tl.store(y_ptr + 2, x2.to(tl.int64))
    tl.store(y_ptr + 3, x3.to(tl.int64))


@triton.jit
def _angles_kernel(a_ptr, cos_ptr, sin_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    cos, sin = _cos_sin(tl.load(a_ptr + at, mask=at < N, other=0.0))
    tl.store(cos_ptr + at, cos, mask=at < N)
    tl.store(sin_ptr + at, sin, mask=at < N)


@triton.jit
def _normals_kernel(y_ptr, start, sample, step_low, step_high, k0, k1, BLOCK: tl.constexpr):
    y = normal_tile(start, sample, step_low, step_high, k0, k1, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


@triton.jit
def _pair_kernel(x0_ptr, x1_ptr, n0_ptr, n1_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x0 = tl.load(x0_ptr + at, mask=at < N, other=0).to(tl.uint32)
    x1 = tl.load(x1_ptr + at, mask=at < N, other=0).to(tl.uint32)
    n0, n1 = _pair_of_normals(x0, x1)
    tl.store(n0_ptr + at, n0, mask=at < N)
    tl.store(n1_ptr + at, n1, mask=at < N)


def at_one_counter(counter, key):
    """The four normals of a counter, by the formula, in float64."""
    x = philox(*counter, *key)
    normals = []
    for first in (0, 2):
        r = math.sqrt(-2 * math.log(x[first] * 2.0**-32 + 2.0**-33))
        a = 2 * math.pi * x[first + 1] * 2.0**-32
        normals += [r * math.cos(a), r * math.sin(a)]
    return normals


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_integers(counter, key, words):
    assert list(philox(*counter, *key)) == words


def test_known_answers_of_tensors():
    for counter, key, words in KNOWN:
        x = philox(*(torch.tensor([c, 0]) for c in counter), *key)
        assert [int(word[0]) for word in x] == words
        assert [int(word[1]) for word in x] == list(philox(0, 0, 0, 0, *key))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_the_kernel(counter, key, words):
    y = torch.empty(4, dtype=torch.int64)
    _words_kernel[(1,)](torch.tensor(counter + key), y)
    assert y.tolist() == words


def test_words_of_counters_that_broadcast():
    c0, c1 = torch.arange(5), torch.arange(3)[:, None] + LAST - 3
    words = philox(c0, c1, 7, LAST, 5, 6)
    for i in range(3):
        for j in range(5):
            assert [int(w[i, j]) for w in words] == list(philox(j, LAST - 3 + i, 7, LAST, 5, 6))


def test_words_of_counters_of_which_some_are_numbers_in_memory():
    c0, c1 = torch.arange(5), torch.arange(3)[:, None]
    steps = torch.tensor(7), torch.tensor(LAST)
    in_memory, integers = philox(c0, c1, *steps, 5, 6), philox(c0, c1, 7, LAST, 5, 6)
    assert all(map(torch.equal, in_memory, integers))
    assert [step.item() for step in steps] == [7, LAST]


def test_a_product_of_words_is_exact():
    for multiplier in (2**31, 0xD2511F53, 0xCD9E8D57, LAST):
        hi, lo = _multiply(torch.tensor(WORDS), multiplier)
        assert hi.tolist() == [word * multiplier >> 32 for word in WORDS]
        assert lo.tolist() == [word * multiplier & LAST for word in WORDS]


def test_counters_are_not_written_over():
    c0, c1 = torch.arange(4), torch.arange(4)
    philox(c0, c1, c0, c1, 5, 6)
    assert torch.equal(c0, torch.arange(4)) and torch.equal(c1, torch.arange(4))


def test_angles_of_the_kernel_are_as_near_as_the_library_s():
    words = torch.cat([torch.tensor(WORDS), torch.randint(2**32, (2000,))])
    a = words.float() * (2 * math.pi * 2.0**-32)
    cos, sin = torch.empty_like(a), torch.empty_like(a)
    _angles_kernel[(1,)](a, cos, sin, len(a), BLOCK=4096)
    assert (cos - a.double().cos()).abs().max() < 1.2e-7
    assert (sin - a.double().sin()).abs().max() < 1.2e-7


def test_normals_are_those_of_the_formula():
    sample, group, steps, key = 5, 2**32 - 4, (9, 2**31 + 1), (LAST, 2**31)
    exact = [n for g in range(4) for n in at_one_counter((group + g, sample, *steps), key)]
    plain = normals_at(torch.tensor([[sample]]), group + torch.arange(4), steps, key)
    assert (plain[0].double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < 2e-6
    tile = torch.empty(16)
    signed = [word - 2**32 if word >= 2**31 else word for word in (sample, *steps, *key)]
    _normals_kernel[(1,)](tile, 4 * group, *signed, BLOCK=16)
    assert (tile - plain[0]).abs().max() < 1e-6


# radii and angles from 0 to the greatest; 2**-33 is what the logarithm of the word 0 is taken of
EXTREMES = [(0, 0), (0, 2**31), (0, LAST), (1, 0), (2**31, 2**29), (LAST, 0), (LAST, 2**31)]


def extreme_normals():
    normals = []
    for x0, x1 in EXTREMES:
        x0, x1 = torch.tensor([x0, x1]).float().tolist()
        u = x0 * 2.0**-32 + 2.0**-33
        r, a = math.sqrt(max(-2 * math.log(min(u, 1.0)), 0)), 2 * math.pi * x1 * 2.0**-32
        normals.append([r * math.cos(a), r * math.sin(a)])
    assert normals[0][0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-12)
    return torch.tensor(normals)


def test_normals_of_extreme_words_are_finite(monkeypatch):
    x0, x1 = torch.tensor(EXTREMES).unbind(1)
    monkeypatch.setattr(_philox, "philox", lambda *counter: (x0[None], x1[None]) * 2)
    normals = normals_at(torch.zeros(1, 1), torch.arange(len(x0)), (0, 0), (0, 0))
    expected = extreme_normals().repeat(1, 2).flatten()
    assert (normals[0] - expected).abs().max() < 2e-6


def test_normals_of_extreme_words_are_finite_in_the_kernel():
    x0, x1 = torch.tensor(EXTREMES).T.contiguous()
    n0, n1 = torch.empty(len(x0)), torch.empty(len(x0))
    _pair_kernel[(1,)](x0, x1, n0, n1, len(x0), BLOCK=8)
    assert (torch.stack([n0, n1], 1) - extreme_normals()).abs().max() < 2e-6
