import importlib

import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops import adaln_norm, gated_adaln_norm, gated_residual
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.tile import (
    MAX_D,
    RowTile,
    programs_per_processor,
    row_launch,
    row_tile,
    tiles_per_program,
)

H100 = 132  # streaming multiprocessors
CPU = torch.device("cpu")
WIDTHS = (384, 768, 1152, 1536)
REGISTERS = {(4, 1): 72, (4, 2): 80, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 255}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: H100)


def tokens(B, T, D):
    return torch.empty(B, T, D, device="meta")


def is_power_of_two(n):
    return n & (n - 1) == 0


@pytest.mark.parametrize("D", WIDTHS)
def test_at_most_a_quarter_of_the_lanes_of_a_common_width_is_idle(D):
    tile = row_tile(D)
    assert D / (tile.BLOCK_D * tile.PIECES) >= 0.75


@pytest.mark.parametrize(
    "D", [1, 2, 383, 384, 385, *WIDTHS, 3072, 3073, 4096, 4097, 6144, 6145, 8193, MAX_D]
)
def test_a_tile_holds_a_row_with_lanes_that_the_compiler_takes(D):
    tile = row_tile(D)
    assert tile.BLOCK_D * tile.PIECES >= D > tile.BLOCK_D * (tile.PIECES - 1)
    assert is_power_of_two(tile.BLOCK_D) and is_power_of_two(tile.BLOCK_T)
    assert is_power_of_two(tile.num_warps) and 4 <= tile.num_warps <= 32
    # the registers of a kernel are said for each shape that there is
    assert tile.shape in REGISTERS


def test_a_warp_has_rows_of_up_to_384_elements_for_itself():
    assert row_tile(128) == RowTile(BLOCK_T=4, BLOCK_D=128, PIECES=1, num_warps=4)
    assert row_tile(384) == RowTile(BLOCK_T=4, BLOCK_D=128, PIECES=3, num_warps=4)
    assert row_tile(385) == RowTile(BLOCK_T=2, BLOCK_D=256, PIECES=2, num_warps=4)


def test_wider_rows_have_more_warps():
    assert row_tile(768) == RowTile(BLOCK_T=2, BLOCK_D=256, PIECES=3, num_warps=4)
    assert row_tile(1152) == RowTile(BLOCK_T=1, BLOCK_D=512, PIECES=3, num_warps=4)
    assert row_tile(3072) == RowTile(BLOCK_T=1, BLOCK_D=1024, PIECES=3, num_warps=8)
    assert row_tile(4096) == RowTile(BLOCK_T=1, BLOCK_D=4096, PIECES=1, num_warps=16)
    assert row_tile(5120) == RowTile(BLOCK_T=1, BLOCK_D=2048, PIECES=3, num_warps=8)
    assert row_tile(6145) == RowTile(BLOCK_T=1, BLOCK_D=8192, PIECES=1, num_warps=32)
    assert row_tile(MAX_D) == RowTile(BLOCK_T=1, BLOCK_D=8192, PIECES=2, num_warps=32)


@pytest.mark.parametrize(
    ("registers", "num_warps", "programs"),
    # by registers, by the 64 warps of a processor, by its 32 programs, by registers by the 256
    [(128, 4, 4), (32, 4, 16), (16, 1, 32), (97, 4, 4), (96, 4, 5), (255, 8, 1)],
)
def test_programs_fit_a_processor(registers, num_warps, programs):
    assert programs_per_processor(registers, num_warps) == programs


@pytest.mark.parametrize("D", [40, 1152])
@pytest.mark.parametrize("T", [1, 7, 256, 1000])
@pytest.mark.parametrize("B", [1, 3, 512])
def test_programs_share_the_rows_in_whole_tiles_and_one_wave(B, T, D, h100):
    launch = row_launch(tokens(B, T, D), REGISTERS)
    assert launch.rows % launch.tile.BLOCK_T == 0
    assert (launch.programs - 1) * launch.rows < B * T <= launch.programs * launch.rows
    fit = programs_per_processor(launch.registers, launch.tile.num_warps)
    assert launch.programs <= fit * H100


@pytest.mark.parametrize(("T", "shared"), [(1, 0), (4, 0), (9, 1), (256, 1)])
def test_samples_are_shared_where_a_program_ends_within_one(T, shared):
    launch = row_launch(tokens(7, T, 384), REGISTERS)
    assert launch.samples_are_shared == shared == int(launch.rows % T > 0)
    assert launch.segments(7) == 7 + shared * (launch.programs - 1)


def test_a_thread_has_no_more_registers_than_its_program_leaves_it():
    assert row_launch(tokens(1, 1, 1152), REGISTERS).options["maxnreg"] == 96
    # two rows to a program
    assert row_launch(tokens(1, 1, 768), REGISTERS).options["maxnreg"] == 96 + 16
    assert row_launch(tokens(1, 1, MAX_D), REGISTERS | {(8, 2): 128}).registers == 64


OPS = (adaln_norm, gated_adaln_norm, gated_residual)
TABLES = ("FORWARD_REGISTERS", "BACKWARD_REGISTERS")


def registers_of(op, table):
    return getattr(importlib.import_module(op.__module__), table)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("table", TABLES)
def test_every_op_says_its_registers_for_every_shape(op, table):
    assert registers_of(op, table).keys() == REGISTERS.keys()


def efficiency(B, D, registers):
    """The rows of a processor if all had the same, over those of the one with most."""
    launch = row_launch(tokens(B, 256, D), registers)
    most = triton.cdiv(launch.programs, H100) * launch.rows
    return B * 256 / (H100 * most)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", WIDTHS)
def test_a_common_batch_uses_nine_tenths_of_a_device(D, op, table, h100):
    for B in (8, 32, 64, 128, 256):
        assert efficiency(B, D, registers_of(op, table)) >= 0.96, B


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", WIDTHS)
def test_a_batch_that_uses_less_is_small_and_rare(D, op, table, h100):
    found = {B: efficiency(B, D, registers_of(op, table)) for B in range(8, 257)}
    # a processor has so few tiles of them that one more or less counts
    wasteful = {B for B, share in found.items() if share < 0.9}
    assert len(wasteful) <= 10 and max(wasteful, default=0) < 48
    assert min(found.values()) > 0.7


@pytest.mark.parametrize("op", [adaln_norm, gated_adaln_norm])
def test_every_batch_fills_the_backward_of_a_norm_of_dit_xl(op, h100):
    registers = registers_of(op, "BACKWARD_REGISTERS")
    assert min(efficiency(B, 1152, registers) for B in range(8, 257)) >= 0.96


def test_fewer_programs_share_tiles_where_the_last_would_have_little(h100):
    # 10 tiles to each processor: 4 programs would have 3 each, and 2 have 5
    assert tiles_per_program(10 * H100, 128, 4, CPU) == 5
    assert tiles_per_program(12 * H100, 128, 4, CPU) == 3


def test_tiles_beside_each_other_share_the_programs(h100):
    assert tiles_per_program(3 * H100, 128, 4, CPU, beside=4) == 3
    assert tiles_per_program(1, 128, 4, CPU, beside=10**6) == 1


def test_the_interpreter_counts_as_one_processor():
    assert tile.processors(CPU) == 1


@triton.jit
def _round_trip_kernel(
    x_ptr, v_ptr, y_ptr, mean_ptr, sum_ptr, T, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)[:, None]
    x = tile.load_row(x_ptr, t * D, t < T, D, BLOCK_D, PIECES)
    v = tile.load_vector(v_ptr, 0, D, BLOCK_T, BLOCK_D, PIECES)
    total = tile.zero_row(BLOCK_T, BLOCK_D, PIECES)

    total = tile.add_rows(x, total, PIECES)
    y = tile.mul_add_rows(v, x, tile.mul_rows(x, x, PIECES), PIECES)

    tile.store_row(y_ptr, t * D, t < T, y, D, BLOCK_D, PIECES)
    tl.store(mean_ptr + t, tile.mean_row(x, D, PIECES), mask=t < T)
    tile.store_vector(sum_ptr, 0, tile.sum_over_rows(total, PIECES), D, BLOCK_D, PIECES)


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
