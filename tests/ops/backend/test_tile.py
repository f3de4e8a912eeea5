import importlib

import pytest
import torch
import triton

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
    # of a common width at most a quarter of the lanes are idle
    assert D not in WIDTHS or D / (tile.BLOCK_D * tile.PIECES) >= 0.75


def test_a_warp_has_narrow_rows_for_itself_and_wider_rows_have_more_warps():
    tiles = {  # BLOCK_T, BLOCK_D, PIECES, num_warps
        128: (4, 128, 1, 4),
        384: (4, 128, 3, 4),
        385: (2, 256, 2, 4),
        768: (2, 256, 3, 4),
        1152: (1, 512, 3, 4),
        3072: (1, 1024, 3, 8),
        4096: (1, 4096, 1, 16),
        5120: (1, 2048, 3, 8),
        6145: (1, 8192, 1, 32),
        MAX_D: (1, 8192, 2, 32),
    }
    assert {D: row_tile(D) for D in tiles} == {D: RowTile(*tile) for D, tile in tiles.items()}


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


def efficiency(B, D, registers):
    """The rows of a processor if all had the same, over those of the one with most."""
    launch = row_launch(tokens(B, 256, D), registers)
    most = triton.cdiv(launch.programs, H100) * launch.rows
    return B * 256 / (H100 * most)


@pytest.mark.parametrize("table", ["FORWARD_REGISTERS", "BACKWARD_REGISTERS"])
@pytest.mark.parametrize("op", ["adaln_norm", "gated_adaln_norm", "gated_residual"])
def test_every_op_uses_nine_tenths_of_a_device(op, table, h100):
    registers = getattr(importlib.import_module(f"dbkernels.ops.{op}"), table)
    assert registers.keys() == REGISTERS.keys()
    for D in WIDTHS:
        found = {B: efficiency(B, D, registers) for B in range(8, 257)}
        assert min(found[B] for B in (8, 32, 64, 128, 256)) >= 0.96
        # a batch that uses less is small and rare: a processor has so few tiles of it that one
        # more or less counts
        wasteful = {B for B, share in found.items() if share < 0.9}
        assert len(wasteful) <= 10 and max(wasteful, default=0) < 48 and min(found.values()) > 0.7
        if D == 1152 and table == "BACKWARD_REGISTERS" and op != "gated_residual":  # DiT-XL
            assert min(found.values()) >= 0.96


def test_fewer_programs_share_tiles_where_the_last_would_have_little(h100):
    # 10 tiles to each processor: 4 programs would have 3 each, and 2 have 5
    assert tiles_per_program(10 * H100, 128, 4, CPU) == 5
    assert tiles_per_program(12 * H100, 128, 4, CPU) == 3


def test_tiles_beside_each_other_share_the_programs(h100):
    assert tiles_per_program(3 * H100, 128, 4, CPU, beside=4) == 3
    assert tiles_per_program(1, 128, 4, CPU, beside=10**6) == 1
