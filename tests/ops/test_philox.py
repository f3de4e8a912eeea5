"""Philox, its normals and uniforms, and the draws and seeds that name them."""

import itertools
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from implementations import implementations
from scipy import stats

from dbkernels.ops import philox as module
from dbkernels.ops.backend.noise_tile import (
    LEVEL,
    NOISE,
    cos_sin,
    noise_tile,
    pair_of_normals,
    run_of_lane,
)
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import (
    Draw,
    _forward_op,
    _multiply,
    _uniform_op,
    counter_words,
    generator,
    kernel_draw,
    key_words,
    noise_launch,
    normals,
    normals_at,
    philox,
    sizes,
    stream_seed,
    uniforms,
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


@pytest.fixture(params=implementations("philox_normal"))
def implementation(request):
    with use_implementation(request.param):
        yield request.param


# words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    """Of integers and of tensors; kernels are compared with integers, number by number."""
    assert list(philox(*counter, *key)) == words
    x = torch.stack(philox(*(torch.tensor([c, 0]) for c in counter), *key), 1)
    assert x.tolist() == [words, list(philox(0, 0, 0, 0, *key))]


def test_counters_broadcast_and_may_lie_in_memory():
    c0, c1 = torch.arange(5), torch.arange(3)[:, None] + LAST - 3
    steps = torch.tensor(7), torch.tensor(LAST)
    words, in_memory = philox(c0, c1, 7, LAST, 5, 6), philox(c0, c1, *steps, 5, 6)
    for i, j in itertools.product(range(3), range(5)):
        assert [int(w[i, j]) for w in words] == list(philox(j, LAST - 3 + i, 7, LAST, 5, 6))
    assert all(map(torch.equal, in_memory, words))
    # none is written over
    assert [step.item() for step in steps] == [7, LAST] and torch.equal(c0, torch.arange(5))


def test_a_product_of_words_is_exact():
    for multiplier in (2**31, 0xD2511F53, 0xCD9E8D57, LAST):
        hi, lo = _multiply(torch.tensor(WORDS), multiplier)
        assert hi.tolist() == [word * multiplier >> 32 for word in WORDS]
        assert lo.tolist() == [word * multiplier & LAST for word in WORDS]


@pytest.mark.parametrize("step", [0, 1, LAST, 2**32, 2**55 + 3, 2**56 - 1])
@pytest.mark.parametrize("stream", [NOISE, LEVEL, 255])
def test_step_and_stream_can_be_read_off_their_words(step, stream):
    low, high = counter_words(step, stream)
    assert 0 <= low <= LAST and 0 <= high <= LAST
    assert ((high >> 8) << 32) + low == step and high & 255 == stream
    given = torch.tensor(step)
    assert [word.item() for word in counter_words(given, stream)] == [low, high]
    assert given.item() == step


def test_words_of_a_key_and_of_a_kernel():
    assert key_words(2**64 - 2) == key_words(-2) == (LAST - 1, LAST)
    assert key_words(3 * 2**32 + 5) == (5, 3)
    step = torch.empty((), dtype=torch.int64, device="meta")  # which has no value to look at
    kept, *words = kernel_draw((2**63 + 2**31, step, LAST))
    assert kept is step and words == [-1, -(2**31), -(2**31)]  # which fit int32
    assert kernel_draw((1, step, 3)) == (step, 3, 1, 0)


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
    both = normals_at(torch.zeros(1, 1), torch.arange(len(x0)), (0, 0), (0, 0)).view(-1, 2, 2)
    assert torch.equal(both[:, 0], both[:, 1])
    return both[:, 0]


@pytest.mark.parametrize("name", ["torch", "triton", compiled])
def test_pairs_of_normals_are_those_of_the_formula(name, monkeypatch):
    extremes = [*itertools.product((0, 1, 300, 2**31, LAST - 200, LAST), WORDS)]
    x0, x1 = torch.cat([torch.tensor(extremes), torch.randint(2**32, (3000, 2))]).T.contiguous()
    # of words and angles that float32 has rounded
    u = (x0.float() * 2.0**-32 + 2.0**-33).double()
    a = (x1.float() * torch.tensor(2 * math.pi * 2.0**-32)).double()
    r = (-2 * u.log()).clamp(min=0).sqrt()
    exact = torch.stack([r * a.cos(), r * a.sin()], 1)
    pairs = pairs_by(name, x0, x1, monkeypatch)
    assert ((pairs.double() - exact).abs() <= 3e-7 * r[:, None]).all()
    # none exceeds that of the word 0
    assert pairs[0, 0].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert pairs.abs().max() == pairs[0, 0]


@triton.jit
def _angles_kernel(a_ptr, cos_ptr, sin_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    cos, sin = cos_sin(tl.load(a_ptr + at, mask=at < N, other=0.0))
    tl.store(cos_ptr + at, cos, mask=at < N)
    tl.store(sin_ptr + at, sin, mask=at < N)


@pytest.mark.parametrize("name", ["triton", compiled])
def test_angles_are_as_near_as_the_library_s(name):
    words = torch.cat([torch.tensor(WORDS), torch.randint(2**32, (3000,))])
    a = words.float() * (2 * math.pi * 2.0**-32)
    cos, sin = torch.empty_like(a), torch.empty_like(a)
    if name == "triton":
        _angles_kernel[(1,)](a, cos, sin, len(a), BLOCK=4096)
    else:
        cos, sin = torch.tensor([_maths.cos_sin(x) for x in a.tolist()]).T
    assert (cos - a.double().cos()).abs().max() < 1.2e-7
    assert (sin - a.double().sin()).abs().max() < 1.2e-7


def at_one_counter(counter, key):
    """The four normals of a counter, by the formula, in float64."""
    x = philox(*counter, *key)
    four = []
    for first in (0, 2):
        r = math.sqrt(-2 * math.log(x[first] * 2.0**-32 + 2.0**-33))
        a = 2 * math.pi * x[first + 1] * 2.0**-32
        four += [r * math.cos(a), r * math.sin(a)]
    return four


@triton.jit
def _tile_kernel(y_ptr, batch, start, step_ptr, sample, key_low, key_high, BLOCK: tl.constexpr):
    batch, start = tl.full((), batch, tl.int64), tl.full((), start, tl.int64)
    y = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


@pytest.mark.parametrize(("draw", "group"), [(DRAWS[1], 2**32 - 4), (Draw(2**63 + 7, 9), 77)])
def test_normals_at_a_counter_are_those_of_the_formula(draw, group):
    seed, step, sample = draw.arguments(3)
    words = counter_words(step.item(), NOISE), key_words(seed)
    counters = [(group + g, sample + 2, *words[0]) for g in range(4)]
    exact = torch.tensor([at_one_counter(c, words[1]) for c in counters]).double().flatten()
    plain = normals_at(torch.tensor([[sample + 2]]), group + torch.arange(4), *words)
    assert (plain[0] - exact).abs().max() < 2e-6
    tile = torch.empty(16)
    _tile_kernel[(1,)](tile, 2, 4 * group, *kernel_draw((seed, step, sample)), BLOCK=16)
    assert (tile - plain[0]).abs().max() < 1e-6


# 1027: a second tile of three elements, and a group of which one is left out
@pytest.mark.parametrize("elements", [1, 5, 1027])
@pytest.mark.parametrize("draw", DRAWS)
def test_normals_are_those_of_plain_torch(implementation, draw, elements):
    fused = normals(draw, 3, elements)
    with use_implementation("torch"):
        plain = normals(draw, 3, elements)
    assert fused.shape == (3, elements) and fused.dtype == torch.float32
    assert (fused - plain).abs().max() <= 1e-6


def test_longer_samples_begin_alike(implementation):
    assert torch.equal(normals(DRAWS[0], 2, 1100)[:, :66], normals(DRAWS[0], 2, 66))


# tiles and chunks


@pytest.mark.parametrize("elements", [1, 3, 128, 129, 1024, 1025, 5000])
def test_tiles_cover_each_sample(elements):
    (programs,), options = noise_launch(3, elements)
    BLOCK, warps = options["BLOCK"], options["num_warps"]
    assert programs % 3 == 0 and (programs // 3 - 1) * BLOCK < elements <= programs // 3 * BLOCK
    # 8 elements to a thread, so that two whole counters give 16 bytes of bfloat16
    assert warps == max(BLOCK // 256, 1) <= 4


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


def test_sizes_of_any_shape():
    shapes = {(3, 4, 5): (3, 20), (3,): (3, 1), (0, 4): (0, 4)}
    assert {shape: sizes(torch.empty(shape)) for shape in shapes} == shapes


# uniforms


def expected_uniforms(draw, B, T):
    low, high = counter_words(draw.step, 1)
    rows = []
    for b in range(B):
        words = [philox(t, draw.sample + b, low, high, *key_words(draw.seed)) for t in range(T)]
        rows.append([((x[0] >> 5) * 2**26 + (x[1] >> 6) + 0.5) * 2.0**-53 for x in words])
    return rows


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


def correlation(a, b):
    return float((a.double() * b.double()).mean() * math.sqrt(a.numel()))


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


def test_moments_of_a_unit_normal():
    x = normals(Draw(1, 2), 64, 4096).double().flatten()
    # standard errors of the first four moments of n numbers: 1, sqrt(2), sqrt(15), sqrt(96)
    moments, errors = (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5)
    for power, (moment, error) in enumerate(zip(moments, errors, strict=True), start=1):
        assert abs(float((x**power).mean()) - moment) < 3.9 * error / math.sqrt(len(x)), power


def test_normals_follow_the_normal_distribution():
    x = normals(Draw(2, 3), 16, 4096)
    for place in range(4):  # of a group
        assert stats.kstest(x[:, place::4].flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3


def test_tails_are_as_heavy_as_a_normal_s():
    x = normals(Draw(3, 4), 256, 4096).abs()
    for radius in (3.0, 4.0):
        expected = x.numel() * 2 * stats.norm.sf(radius)
        assert abs(int((x > radius).sum()) - expected) < 3.9 * math.sqrt(expected)


@pytest.mark.parametrize(("B", "T"), [(20_000, None), (1, 20_000), (100, 200)])
def test_uniforms_follow_the_uniform_distribution(B, T):
    u = uniforms(Draw(4, 5), B, T).flatten()
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    # the bits below those of float32 count too
    assert stats.kstest((u * 2**24 % 1).numpy(), "uniform").pvalue > 1e-3


def test_draws_are_uncorrelated():
    x = normals(Draw(5, 6, 8), 16, 4096)
    u = (uniforms(Draw(5, 6, 8), 16, 4096) - 0.5) * math.sqrt(12)
    levels = (uniforms(Draw(5, 6, 8), 4000, 1) - 0.5) * math.sqrt(12)
    noise = normals(Draw(5, 6, 8), 4000, 4)
    pairs = {
        "samples": (x[:-1], x[1:]),
        "elements": (x[:, :-1], x[:, 1:]),
        "places of a group": (x[:, ::2], x[:, 1::2]),
        "radii": (x[:, :-2].square() - 1, x[:, 2:].square() - 1),
        "steps": (x, normals(Draw(5, 7, 8), 16, 4096)),
        "high steps": (x, normals(Draw(5, 6 + 2**32, 8), 16, 4096)),
        "seeds": (x, normals(Draw(6, 6, 8), 16, 4096)),
        "high seeds": (x, normals(Draw(5 + 2**32, 6, 8), 16, 4096)),
        "far samples": (x, normals(Draw(5, 6, 2**31), 16, 4096)),
        "tokens": (u[:, :-1], u[:, 1:]),
        "samples' tokens": (u[:-1], u[1:]),
        "a token and its noise": (u[:, :1024], x[:, :1024]),
        "a token and its group": (u[:, :1024], x[:, ::4]),
        **{f"level, place {n}": (levels, noise[:, n : n + 1]) for n in range(4)},
        **{f"level, radius {n}": (levels, noise[:, n : n + 1].square() - 1) for n in range(4)},
    }
    for name, (a, b) in pairs.items():
        # a square less 1 has a variance of 2
        spread = {"radii": 2, "level, radius": 2**0.5}.get(name.rstrip(" 0123"), 1)
        assert abs(correlation(a, b)) < 3.9 * spread, name


def test_are_well_formed_torch_ops(implementation):
    step = torch.tensor(6)
    torch.library.opcheck(_forward_op, (torch.empty(2, 9), 5, step, 7))
    torch.library.opcheck(_uniform_op, (torch.empty(2, 3, dtype=torch.float64), 5, step, 7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Draw(2**64, 0), r"seed must be in \[0, 18446744073709551616\), got 184467"),
        (lambda: Draw(-1, 0), "seed must be in"),
        (lambda: Draw(0, 2**56), "step must be in .*, got 72057594037927936"),
        (lambda: Draw(0, 0, 2**32), "sample must be in .*, got 4294967296"),
        (lambda: Draw(0, 0, -1), "sample must be in .*, got -1"),
        (lambda: Draw(0, 0.5), "step must be an integer, got 0.5"),
        (lambda: Draw(True, 0), "seed must be an integer, got True"),
        (lambda: Draw(0, torch.zeros(1).long()), r"or \(\) torch.int64, got \(1,\) torch.int64"),
        (lambda: Draw(0, torch.zeros(())), r"or \(\) torch.int64, got \(\) torch.float32"),
        (lambda: Draw(0, torch.zeros(()).int()), r"step must be an integer or .* torch.int32"),
        (lambda: Draw(torch.tensor(0), 0), r"seed must be an integer, got tensor\(0"),
        (lambda: Draw(0, 0, torch.tensor(0)), r"sample must be an integer, got tensor\(0"),
        (lambda: normals(Draw(0, 0, 2**32 - 2), 3, 1), r"at most 4294967296, got 4294967294 \+ 3"),
        (lambda: uniforms(Draw(0, 0, 2**32 - 2), 3), r"sample \+ B must be at most"),
        (lambda: uniforms(Draw(0, 0, 2**32 - 2), 3, 5), r"sample \+ B must be at most"),
        (lambda: uniforms(Draw(0, 0), 3, "cpu"), "T must be an integer, got 'cpu'"),
        (lambda: uniforms(Draw(0, 0), 1, 2**32 + 1), r"T must be in \[0, 4294967296\], got 429496"),
        (lambda: uniforms(Draw(0, 0), 1, -1), "T must be in .*, got -1"),
        (lambda: normals(Draw(0, 0), 1, 2**34 + 1), "at most 17179869184 elements, got 1717986918"),
    ],
)
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


def test_distinct_keys_have_distinct_seeds():
    # (), (0,) and (0, 0) differ in length alone; 2**32 and -1 would be lost in 32 unsigned bits
    values = (0, 1, -1, 2, 2**32, 2**63 - 1, -(2**63))
    keys = [key for size in range(4) for key in itertools.product(values, repeat=size)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    assert stream_seed(1, 2) != stream_seed(2, 1)


def test_a_seed_is_the_same_on_every_machine_and_for_any_kind_of_integer():
    assert stream_seed(0, 1, 2) == 4450782424123420391
    assert stream_seed(np.int32(3), torch.tensor(4)) == stream_seed(3, 4)


def test_a_seed_fits_a_signed_64_bit_integer():
    seeds = [stream_seed(key) for key in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are used


@pytest.mark.parametrize("part", [2**63, -(2**63) - 1, 0.5, "1", None])
def test_rejects_what_is_not_a_64_bit_integer(part):
    with pytest.raises(ValueError, match="key must be 64-bit integers, got"):
        stream_seed(0, part)


def test_a_generator_starts_the_stream_of_its_key_and_no_other():
    before = torch.get_rng_state()
    keys = [(1, 2), (1, 2), (2, 1)]
    first, again, other = (
        torch.rand(4, generator=generator(torch.device("cpu"), *key), device="cpu") for key in keys
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert generator("cpu", 1, 2).initial_seed() == stream_seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before)
