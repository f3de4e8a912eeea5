import math

import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops import _noise
from dbkernels.ops._noise import (
    NOISE,
    SIGMA,
    check_levels,
    check_noise,
    counter_words,
    kernel_draw,
    key_words,
    load_step,
    noise_chunks,
    noise_launch,
    noise_tile,
    sizes,
)
from dbkernels.ops._philox import normals_at

LAST = 2**32 - 1


@triton.jit
def _tile_kernel(y_ptr, batch, start, step_ptr, sample, key_low, key_high, BLOCK: tl.constexpr):
    batch, start = tl.full((), batch, tl.int64), tl.full((), start, tl.int64)
    y = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), y)


@triton.jit
def _step_kernel(step_ptr, words_ptr, STREAM: tl.constexpr):
    low, high = load_step(step_ptr, STREAM)
    tl.store(words_ptr, low.to(tl.int64))
    tl.store(words_ptr + 1, high.to(tl.int64))


@pytest.mark.parametrize("step", [0, 1, LAST, 2**32, 2**55 + 3, 2**56 - 1])
@pytest.mark.parametrize("stream", [NOISE, SIGMA, 255])
def test_step_and_stream_can_be_read_off_their_words(step, stream):
    low, high = counter_words(step, stream)
    assert 0 <= low <= LAST and 0 <= high <= LAST
    assert (low + (high >> 8 << 32), high & 255) == (step, stream)


@pytest.mark.parametrize("step", [0, 1, LAST, 2**32, 2**55 + 3, 2**56 - 1])
@pytest.mark.parametrize("stream", [NOISE, SIGMA, 255])
def test_words_of_a_step_in_memory_are_those_of_the_integer(step, stream):
    given, words = torch.tensor(step), torch.empty(2, dtype=torch.int64)
    expected = list(counter_words(step, stream))
    assert [word.item() for word in counter_words(given, stream)] == expected
    _step_kernel[(1,)](given, words, stream)
    assert words.tolist() == expected and given.item() == step


def test_noise_and_sigma_are_different_streams():
    assert (NOISE, SIGMA) == (0, 1)


def test_key_words_are_those_of_the_unsigned_seed():
    assert key_words(2**64 - 2) == key_words(-2) == (LAST - 1, LAST)
    assert key_words(3 * 2**32 + 5) == (5, 3)


def test_words_of_a_kernel_fit_int32():
    step = torch.empty((), dtype=torch.int64, device="meta")  # which has no value to look at
    kept, *words = kernel_draw((2**63 + 2**31, step, LAST))
    assert kept is step and words == [-1, -(2**31), -(2**31)]
    assert kernel_draw((1, step, 3)) == (step, 3, 1, 0)


@pytest.mark.parametrize("elements", [1, 3, 128, 129, 1024, 1025, 5000])
def test_tiles_cover_each_sample(elements):
    (programs,), options = noise_launch(3, elements)
    BLOCK, warps = options["BLOCK"], options["num_warps"]
    assert programs % 3 == 0 and (programs // 3 - 1) * BLOCK < elements <= programs // 3 * BLOCK
    # 8 elements to a thread, so that two whole counters give 16 bytes of bfloat16
    assert warps == max(BLOCK // 256, 1) <= 4


def test_a_tile_at_the_end_of_the_counter():
    draw, batch, start = (2**64 - 1, torch.tensor(2**56 - 1), LAST - 2), 2, 2**34 - 16
    y = torch.empty(16)
    _tile_kernel[(1,)](y, batch, start, *kernel_draw(draw), BLOCK=16)
    words = counter_words(draw[1], NOISE), key_words(draw[0])
    expected = normals_at(torch.tensor([[LAST]]), torch.arange(2**32 - 4, 2**32), *words)
    assert (y - expected[0]).abs().max() < 1e-6


# 64 cuts rows, 1000 takes several, 2**16 all at once; 7 and 130 are no multiples of 4
@pytest.mark.parametrize("elements", [1, 7, 130])
@pytest.mark.parametrize("chunk", [64, 1000])
def test_chunks_do_not_depend_on_their_size(elements, chunk, monkeypatch):
    step = torch.tensor(6)

    def whole():
        noise = torch.full((9, elements), torch.nan)
        for rows, cols, part in noise_chunks((5, step, 7), 9, elements, noise.device):
            assert noise[rows, cols].isnan().all()
            noise[rows, cols] = part
        return noise

    expected = whole()
    assert not expected.isnan().any()
    monkeypatch.setattr(_noise, "CHUNK", chunk)
    assert torch.equal(whole(), expected) and step.item() == 6


def test_sizes_of_any_shape():
    assert sizes(torch.empty(3, 4, 5)) == (3, 20)
    assert sizes(torch.empty(3)) == (3, 1)
    assert sizes(torch.empty(0, 4)) == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z0": torch.zeros((), device="cpu")}, r"z0 must be \(B, ...\), got a scalar"),
        ({"z0": torch.zeros(2, 3).long()}, "z0 must be one of float32"),
        ({"sigma": torch.ones(3)}, r"sigma must be \(2,\) torch.float32 on .*, got \(3,\)"),
        ({"sigma": torch.ones(2).double()}, r"sigma must be .*, got \(2,\) torch.float64"),
        ({"sigma": torch.ones(2, device="meta")}, "sigma must be .* on meta"),
        ({"sigma": torch.ones(2).requires_grad_()}, "sigma must not require a gradient"),
        ({"sigma_data": 0.0}, "sigma_data must be positive, got 0.0"),
    ],
)
def test_rejects(change, message):
    given = {"z0": torch.zeros(2, 3), "sigma": torch.ones(2), "sigma_data": 0.5} | change
    with pytest.raises(ValueError, match=message):
        check_noise("z0", **given)


@pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
def test_levels_are_positive_numbers(level):
    check_levels(torch.tensor([1.0, 80.0]))
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, got {level}$"):
        check_levels(torch.tensor([1.0, level]))
