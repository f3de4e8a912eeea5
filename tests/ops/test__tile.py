from dataclasses import asdict

import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops import _tile
from dbkernels.ops._tile import MAX_D, RowTile, partial_sums, row_tile, rows_per_program

WIDTHS = (384, 768, 1152, 1536)


def is_power_of_two(n):
    return n & (n - 1) == 0


@pytest.mark.parametrize("D", WIDTHS)
def test_at_most_a_quarter_of_the_lanes_of_a_common_width_is_idle(D):
    tile = row_tile(D)
    assert D / (tile.BLOCK_D * tile.PIECES) >= 0.75


@pytest.mark.parametrize("D", [1, 2, 255, 256, 257, *WIDTHS, 4096, 5000, 8192, MAX_D - 1, MAX_D])
def test_a_tile_holds_a_row_with_lanes_that_the_compiler_takes(D):
    tile = row_tile(D)
    assert tile.BLOCK_D * tile.PIECES >= D > tile.BLOCK_D * (tile.PIECES - 1)
    assert is_power_of_two(tile.BLOCK_D) and is_power_of_two(tile.BLOCK_T)
    assert is_power_of_two(tile.num_warps) and 4 <= tile.num_warps <= 32
    assert 1 <= tile.PIECES <= 3


@pytest.mark.parametrize("D", [1, 384, 1152, 4096, MAX_D])
def test_each_thread_reads_16_bytes_of_bfloat16_at_once(D):
    tile = row_tile(D)
    threads = 32 * tile.num_warps
    assert tile.BLOCK_T * tile.BLOCK_D / threads == 8


def test_a_row_has_as_many_threads_as_its_idle_lanes_allow():
    assert row_tile(128) == RowTile(BLOCK_T=4, BLOCK_D=256, PIECES=1, num_warps=4)
    assert row_tile(768) == RowTile(BLOCK_T=1, BLOCK_D=1024, PIECES=1, num_warps=4)
    assert row_tile(1152) == RowTile(BLOCK_T=2, BLOCK_D=512, PIECES=3, num_warps=4)
    assert row_tile(1536) == RowTile(BLOCK_T=1, BLOCK_D=2048, PIECES=1, num_warps=8)


@pytest.mark.parametrize(("B", "T", "programs"), [(2, 21, 3), (5, 4, 1), (1, 1, 16)])
def test_the_grid_covers_every_row_once(B, T, programs):
    grid, rows, tile = _tile.row_launch(torch.empty(B, T, 40), programs)
    assert grid == (B, triton.cdiv(T, rows))
    assert tile == asdict(row_tile(40))
    assert rows == rows_per_program(B, T, row_tile(40), programs, torch.device("cpu"))


@pytest.mark.parametrize("D", [128, 1152])
@pytest.mark.parametrize("T", [1, 7, 256, 1000])
@pytest.mark.parametrize("B", [1, 3, 512])
def test_rows_of_the_programs_cover_a_sample_in_whole_tiles(B, T, D, monkeypatch):
    monkeypatch.setattr(_tile, "processors", lambda device: 132)
    tile = row_tile(D)
    rows = rows_per_program(B, T, tile, 4, torch.device("cpu"))
    assert rows % tile.BLOCK_T == 0 and rows >= tile.BLOCK_T
    assert triton.cdiv(T, rows) * rows >= T
    assert triton.cdiv(T, rows) * B <= 4 * 132 + B


def test_one_sample_fills_the_processors(monkeypatch):
    monkeypatch.setattr(_tile, "processors", lambda device: 132)
    rows = rows_per_program(1, 4096, row_tile(1024), 4, torch.device("cpu"))
    assert rows == 8 and triton.cdiv(4096, rows) >= 132


def test_a_large_batch_gives_each_program_a_whole_sample(monkeypatch):
    monkeypatch.setattr(_tile, "processors", lambda device: 132)
    assert rows_per_program(528, 256, row_tile(1024), 4, torch.device("cpu")) == 256


def test_the_interpreter_counts_as_one_processor():
    assert _tile.processors(torch.device("cpu")) == 1


def test_one_split_writes_its_sums_into_the_result():
    outs = torch.empty(2, 3), torch.empty(2, 3)
    with partial_sums(1, *outs) as sums:
        assert sums[0] is outs[0] and sums[1] is outs[1]


def test_sums_of_splits_are_added_in_float32():
    outs = torch.empty(2, 1, dtype=torch.bfloat16), torch.empty(2, 1, dtype=torch.bfloat16)
    with partial_sums(3, *outs) as sums:
        assert [(part.shape, part.dtype) for part in sums] == 2 * [((2, 3, 1), torch.float32)]
        sums[0].copy_(torch.tensor([[1.0, 2**-9, 2**-9], [4.0, 5.0, 6.0]])[..., None])
        sums[1].fill_(2.0)
    # in bfloat16, 1 + 2**-9 + 2**-9 would stay 1; 1 + 2**-8 is a tie that goes to 1 as well
    assert outs[0].tolist() == [[1.0], [15.0]] and outs[1].tolist() == [[6.0], [6.0]]


@triton.jit
def _round_trip_kernel(
    x_ptr, v_ptr, y_ptr, mean_ptr, sum_ptr, T, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)[:, None]
    x = _tile.load_row(x_ptr, t * D, t < T, D, BLOCK_D, PIECES)
    v = _tile.load_vector(v_ptr, 0, D, BLOCK_D, PIECES)
    total = _tile.zero_row(BLOCK_T, BLOCK_D, PIECES)

    total = _tile.add_rows(x, total, PIECES)
    y = _tile.mul_add_rows(v, x, _tile.mul_rows(x, x, PIECES), PIECES)

    _tile.store_row(y_ptr, t * D, t < T, y, D, BLOCK_D, PIECES)
    tl.store(mean_ptr + t, _tile.mean_row(x, D, PIECES), mask=t < T)
    _tile.store_vector(sum_ptr, 0, _tile.sum_over_rows(total, PIECES), D, BLOCK_D, PIECES)


@pytest.mark.parametrize("D", [1, 48, 64, 65, 191, 192])
def test_rows_are_loaded_summed_and_stored_within_their_bounds(D):
    T, guard = 3, 7.0
    x, v = torch.randn(T, D), torch.randn(D)
    y, mean, total = (torch.full((n + 9,), guard) for n in (T * D, T, D))
    # a fourth row, and lanes past D, of which no kernel may read or write anything
    x_guarded = torch.cat([x.reshape(-1), torch.full((256,), float("nan"))])
    v_guarded = torch.cat([v, torch.full((256,), float("nan"))])
    _round_trip_kernel[(1,)](
        x_guarded, v_guarded, y, mean, total, T, D, BLOCK_T=4, BLOCK_D=64, PIECES=3
    )
    assert torch.equal(y[T * D :], torch.full((9,), guard))
    assert torch.equal(mean[T:], torch.full((9,), guard))
    assert torch.equal(total[D:], torch.full((9,), guard))
    torch.testing.assert_close(y[: T * D].view(T, D), v * x + x * x)
    torch.testing.assert_close(mean[:T], x.mean(1))
    torch.testing.assert_close(total[:D], x.sum(0))
