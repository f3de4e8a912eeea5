"""Philox, its normals and uniforms, and the draws and seeds that name them."""

import itertools
import math
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from implementations import each_implementation

from dbkernels.ops import philox as module
from dbkernels.ops.backend.noise_tile import LEVEL, NOISE, noise_tile, pair_of_normals, run_of_lane
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, generator, normals, philox, stream_seed, uniforms

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
DRAWS = [Draw(0, 0), Draw(2**64 - 1, 2**56 - 1, 2**32 - 3), Draw(12345678901234567890, 77, 3)]
if find_spec("dbkernels.ops._maths"):
    from dbkernels.ops import _maths
else:
    _maths = None
compiled = pytest.param("cpp", marks=pytest.mark.skipif(not _maths, reason="was not built"))


implementation = each_implementation("philox_normal")


# words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    """Of integers and of tensors; kernels are compared with integers, number by number."""
    assert list(philox(*counter, *key)) == words
    x = torch.stack(philox(*(torch.tensor([c, 0]) for c in counter), *key), 1)
    assert x.tolist() == [words, list(philox(0, 0, 0, 0, *key))]


def test_step_and_stream_can_be_read_off_their_words():
    steps = [0, 1, LAST, 2**32, 2**55 + 3, 2**56 - 1]
    for step, stream in itertools.product(steps, (NOISE, LEVEL, 255)):
        low, high = module.counter_words(step, stream)
        assert 0 <= low <= LAST and 0 <= high <= LAST
        assert ((high >> 8) << 32) + low == step and high & 255 == stream
        given = torch.tensor(step)
        assert [word.item() for word in module.counter_words(given, stream)] == [low, high]
        assert given.item() == step


def test_words_of_a_kernel_fit_int32():
    step = torch.empty((), dtype=torch.int64, device="meta")  # which has no value to look at
    kept, *words = module.kernel_draw((2**63 + 2**31, step, LAST))
    assert kept is step and words == [-1, -(2**31), -(2**31)]


# normals


@triton.jit
def _pair_kernel(x0_ptr, x1_ptr, n0_ptr, n1_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x0 = tl.load(x0_ptr + at, mask=at < N, other=0).to(tl.uint32)
    x1 = tl.load(x1_ptr + at, mask=at < N, other=0).to(tl.uint32)
    n0, n1 = pair_of_normals(x0, x1)
    tl.store(n0_ptr + at, n0, mask=at < N)
    tl.store(n1_ptr + at, n1, mask=at < N)


def pairs_by(name, x0, x1, monkeypatch):
    """(N, 2) normals of words."""
    if name == "cpp":
        return torch.tensor(list(map(_maths.pair_of_normals, x0.tolist(), x1.tolist())))
    if name == "triton":
        pairs = torch.empty(2, len(x0))
        _pair_kernel[(1,)](x0, x1, *pairs, len(x0), BLOCK=triton.next_power_of_2(len(x0)))
        return pairs.T
    monkeypatch.setattr(module, "philox", lambda *counter: (x0[None], x1[None]) * 2)
    both = module.normals_at(torch.arange(len(x0)), torch.zeros(1, 1), 0, 0, 0, 0).view(-1, 2, 2)
    assert torch.equal(both[:, 0], both[:, 1])
    return both[:, 0]


def formula(x0, x1):
    """Pairs (..., 2) in float64, of words and angles that float32 has rounded."""
    u = (x0.float() * 2.0**-32 + 2.0**-33).double()
    a = (x1.float() * torch.tensor(2 * math.pi * 2.0**-32)).double()
    r = (-2 * u.log()).clamp(min=0).sqrt()
    return torch.stack([r * a.cos(), r * a.sin()], -1)


@pytest.mark.parametrize("name", ["torch", "triton", compiled])
def test_pairs_of_normals_are_those_of_the_formula(name, monkeypatch):
    extremes = [*itertools.product((0, 1, 300, 2**31, LAST - 200, LAST), WORDS)]
    x0, x1 = torch.cat([torch.tensor(extremes), torch.randint(2**32, (3000, 2))]).T.contiguous()
    exact, pairs = formula(x0, x1), pairs_by(name, x0, x1, monkeypatch)
    assert ((pairs.double() - exact).abs() <= 3e-7 * exact.norm(dim=1, keepdim=True)).all()
    # none exceeds that of the word 0
    assert pairs[0, 0].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert pairs.abs().max() == pairs[0, 0]


@triton.jit
def _tile_kernel(y_ptr, batch, start, step_ptr, sample, key_low, key_high, BLOCK: tl.constexpr):
    batch, start = tl.full((), batch, tl.int64), tl.full((), start, tl.int64)
    y = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


@pytest.mark.parametrize(("draw", "group"), [(DRAWS[1], 2**32 - 4), (Draw(2**63 + 7, 9), 77)])
def test_normals_at_a_counter_are_those_of_the_formula(draw, group):
    seed, step, sample = draw.arguments(3)
    words = *module.counter_words(step.item(), NOISE), *module.key_words(seed)
    plain = module.normals_at(group + torch.arange(4), torch.tensor([[sample + 2]]), *words)
    x = philox(group + torch.arange(4), sample + 2, *words)
    exact = torch.stack([formula(*x[:2]), formula(*x[2:])], 1).flatten()
    assert (plain[0] - exact).abs().max() < 2e-6
    tile = torch.empty(16)
    _tile_kernel[(1,)](tile, 2, 4 * group, *module.kernel_draw((seed, step, sample)), BLOCK=16)
    assert (tile - plain[0]).abs().max() < 1e-6


# about a group, a vector of groups, what a tile is filled to, and a tile
SIZES = [*range(1, 10), 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 1060, 2051]


@pytest.mark.parametrize("draw", DRAWS)
def test_normals_are_those_of_plain_torch(implementation, draw):
    sizes = [(3, elements) for elements in SIZES[:: 3 if implementation == "triton" else 1]]
    if implementation == "cpp" and draw.sample < 2**31:  # one thread has many small samples
        sizes += [(1500, elements) for elements in (1, 2, 33)]
    for B, elements in sizes:
        fused = normals(draw, B, elements)
        with use_implementation("torch"):
            plain = normals(draw, B, elements)
        assert fused.shape == (B, elements) and fused.dtype == torch.float32
        assert (fused - plain).abs().max() <= 1e-6, (B, elements)


# tiles and chunks


def test_tiles_cover_each_sample():
    for elements in (1, 3, 128, 129, 1024, 1025, 5000):
        (programs,), options = module.noise_launch(3, elements)
        BLOCK, tiles = options["BLOCK"], programs // 3
        assert programs % 3 == 0 and (tiles - 1) * BLOCK < elements <= tiles * BLOCK
        # 8 elements to a thread, so that two whole counters give 16 bytes of bfloat16
        assert options["num_warps"] == max(BLOCK // 256, 1) <= 4


@triton.jit
def _runs_kernel(y_ptr, start, run, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    start = tl.full((), start, tl.int64)
    tl.store(y_ptr + lanes, run_of_lane(start, lanes, run, BLOCK))


@pytest.mark.parametrize("run", [1, 2, 5, 63, 64, 65, 2**31, 2**33 + 7])
@pytest.mark.parametrize("start", [0, 64, 2**33 - 64, 2**34 - 64])
def test_an_element_lies_in_the_run_that_it_divides_to(start, run):
    runs = torch.empty(64, dtype=torch.int64)
    _runs_kernel[(1,)](runs, start, run, BLOCK=64)
    assert runs.tolist() == [element // run for element in range(start, start + 64)]


# uniforms


def expected_uniforms(draw, B, T):
    words = *module.counter_words(draw.step, LEVEL), *module.key_words(draw.seed)
    tokens = ([philox(t, draw.sample + b, *words) for t in range(T)] for b in range(B))
    return [[((x0 >> 5) * 2**26 + (x1 >> 6) + 0.5) * 2.0**-53 for x0, x1, *_ in x] for x in tokens]


# 300 are more than one tile
@pytest.mark.parametrize(("B", "T"), [(300, 1), (1, 300), (7, 45), (3, 1)])
@pytest.mark.parametrize("draw", [*DRAWS, Draw(7 * 2**32 + 5, 3 * 2**32 + 9, 2**32 - 300)])
def test_uniforms_are_53_bits_of_stream_1_bit_for_bit(implementation, draw, B, T):
    B = min(B, 2**32 - draw.sample)
    numbers = uniforms(draw, B, T)
    assert numbers.dtype == torch.float64 and numbers.tolist() == expected_uniforms(draw, B, T)
    # that of a sample is that of its first token
    of_samples = uniforms(draw, B)
    assert of_samples.is_contiguous() and torch.equal(of_samples, numbers[:, 0])


# what is drawn


def test_each_part_of_a_draw_changes_every_number(implementation):
    draw = Draw(5, 6, 7)
    others = [
        *(Draw(4, 6, 7), Draw(5 + 2**32, 6, 7), Draw(5 + 2**63, 6, 7)),
        *(Draw(5, 7, 7), Draw(5, 6 + 2**32, 7), Draw(5, 6 + 2**55, 7)),
        *(Draw(5, 6, 8), Draw(5, 6, 7 + 2**31)),
    ]
    expected, levels = normals(draw, 1, 100), uniforms(draw, 1, 100)
    for other in others:
        assert (normals(other, 1, 100) != expected).all(), other
        assert (uniforms(other, 1, 100) != levels).all(), other
    assert len(levels.unique()) == 100


REJECTED = [
    (lambda: Draw(2**64, 0), r"seed must be in \[0, 18446744073709551616\), got 184467"),
    (lambda: Draw(-1, 0), "seed must be in"),
    (lambda: Draw(0, 2**56), "step must be in .*, got 72057594037927936"),
    (lambda: Draw(0, 0, 2**32), "sample must be in .*, got 4294967296"),
    (lambda: Draw(0, 0, -1), "sample must be in .*, got -1"),
    (lambda: Draw(0, 0.5), "step must be an integer, got 0.5"),
    (lambda: Draw(True, 0), "seed must be an integer, got True"),
    (lambda: Draw(0, torch.zeros(1).long()), r"or \(\) torch.int64, got \(1,\) torch.int64"),
    (lambda: Draw(0, torch.zeros(())), r"or \(\) torch.int64, got \(\) torch.float32"),
    (lambda: Draw(torch.tensor(0), 0), r"seed must be an integer, got tensor\(0"),
    (lambda: uniforms(Draw(0, 0, 2**32 - 2), 3, 5), r"sample \+ B must be at most"),
    (lambda: uniforms(DRAWS[0], 3, "cpu"), "T must be an integer, got 'cpu'"),
    (lambda: uniforms(DRAWS[0], 1, 2**32 + 1), r"T must be in \[0, 4294967296\], got 429496"),
    (lambda: uniforms(DRAWS[0], 1, -1), "T must be in .*, got -1"),
    (lambda: normals(DRAWS[0], 1, 2**34 + 1), "at most 17179869184 elements, got 1717986918"),
    *(
        (partial(stream_seed, 0, part), "key must be 64-bit integers, got")
        for part in (2**63, -(2**63) - 1, 0.5, "1", None)
    ),
]


@pytest.mark.parametrize(("call", "message"), REJECTED)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_last_of_everything_is_accepted():
    seed, step, sample = Draw(2**64 - 1, 2**56 - 1, 2**32 - 1).arguments(1, 2**34)
    assert (seed, step.item(), sample) == (-1, 2**56 - 1, 2**32 - 1)
    assert step.shape == () and step.dtype == torch.int64
    assert Draw(2**63 - 1, 0).arguments(2**32)[0] == 2**63 - 1
    assert Draw(2**63, 0).arguments(1)[0] == -(2**63)


# seeds


def test_distinct_keys_have_distinct_seeds_of_63_bits():
    # (), (0,) and (0, 0) differ in length alone; 2**32 and -1 would be lost in 32 unsigned bits
    values = (0, 1, -1, 2, 2**32, 2**63 - 1, -(2**63))
    keys = [key for size in range(4) for key in itertools.product(values, repeat=size)]
    seeds = {stream_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    # the same on every machine and for any kind of integer
    assert stream_seed(0, 1, 2) == 4450782424123420391
    assert stream_seed(np.int32(3), torch.tensor(4)) == stream_seed(3, 4)


def test_a_generator_starts_the_stream_of_its_key_and_no_other():
    before = torch.get_rng_state()
    keys = [(1, 2), (1, 2), (2, 1)]
    first, again, other = (
        torch.rand(4, generator=generator(torch.device("cpu"), *key), device="cpu") for key in keys
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert generator("cpu", 1, 2).initial_seed() == stream_seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before)
