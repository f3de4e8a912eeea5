"""How rows are cut into tiles and shared out, and how the sums of programs are added."""

import importlib

import pytest
import torch
import triton
from ops.one_layer import OneLayer
from ops.raw_calls import FLOAT32, Scratch

from dbkernels.ops.backend import sums as sums_module
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import dry_run_on_gpu, use_implementation
from dbkernels.ops.backend.sums import partial_sums
from dbkernels.ops.backend.tile import MAX_D, RowTile, row_launch, row_tile
from dbkernels.ops.philox import Draw
from dbkernels.ops.score_loss import score_loss

H100 = 132  # streaming multiprocessors
T, D, H = 16, 16, 2  # of a layer
CPU = torch.device("cpu")
WIDTHS = (384, 768, 1152, 1536)
REGISTERS = {(4, 1): 72, (4, 2): 80, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 255}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: H100)


def tokens(B, T, D):
    return torch.empty(B, T, D, device="meta")


@pytest.mark.parametrize(
    "D", [1, 2, 383, 384, 385, *WIDTHS, 3072, 3073, 4096, 4097, 6144, 6145, 8193, MAX_D]
)
def test_a_tile_holds_a_row_with_lanes_that_the_compiler_takes(D):
    tile = row_tile(D)
    assert tile.BLOCK_D * tile.PIECES >= D > tile.BLOCK_D * (tile.PIECES - 1)
    assert all(n & (n - 1) == 0 for n in (tile.BLOCK_D, tile.BLOCK_T, tile.num_warps))
    assert 4 <= tile.num_warps <= 32
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
    assert tile.programs_per_processor(registers, num_warps) == programs


@pytest.mark.parametrize("D", [40, 1152])
@pytest.mark.parametrize("T", [1, 7, 256, 1000])
@pytest.mark.parametrize("B", [1, 3, 512])
def test_programs_share_the_rows_in_whole_tiles_and_one_wave(B, T, D, h100):
    launch = row_launch(tokens(B, T, D), REGISTERS)
    assert launch.rows % launch.tile.BLOCK_T == 0
    assert (launch.programs - 1) * launch.rows < B * T <= launch.programs * launch.rows
    fit = tile.programs_per_processor(launch.registers, launch.tile.num_warps)
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
    assert tile.tiles_per_program(10 * H100, 128, 4, CPU) == 5
    assert tile.tiles_per_program(12 * H100, 128, 4, CPU) == 3


def test_tiles_beside_each_other_share_the_programs(h100):
    assert tile.tiles_per_program(3 * H100, 128, 4, CPU, beside=4) == 3
    assert tile.tiles_per_program(1, 128, 4, CPU, beside=10**6) == 1


def test_parts_are_added_in_float32_and_rounded_once_into_slices():
    whole = torch.zeros(2, 6, dtype=torch.bfloat16)
    outs = whole[:, 1:3], whole[:, 4:6]
    # the second of three programs holds rows of both samples
    with partial_sums(*outs, T=6, rows=4, segments=4) as sums:
        assert [(part.shape, part.dtype) for part in sums] == 2 * [((4, 2), torch.float32)]
        sums[0].copy_(torch.tensor([[1.0, 4.0], [2**-7, 5.0], [1.0, 2**-9], [2**-9, 1.0]]))
        sums[1].fill_(2.0)
    assert whole.tolist() == [[0, 1 + 2**-7, 9, 0, 4, 4], [0, 1, 1, 0, 4, 4]]


def test_small_parts_are_not_lost_in_a_large_one():
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    with partial_sums(out, T=5, rows=1, segments=5) as (sums,):
        sums.copy_(torch.tensor([[1.0], [2**-9], [2**-9], [2**-9], [2**-9]]))
    # added in bfloat16 one by one, the sum would stay 1
    assert out.item() == 1 + 2**-7


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("outs", [1, 2, 3])
def test_any_number_of_parts_of_any_width_is_added_in_one_launch(count, outs, monkeypatch):
    grids, kernel = [], sums_module._sum_kernel

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(sums_module, "_sum_kernel", Counted())
    D, parts = 130, torch.randn(outs, count, 130)
    totals = [torch.full((1, D), float("nan")) for _ in range(outs)]
    with partial_sums(*totals, T=3 * count - 1, rows=3, segments=count) as sums:
        for part, values in zip(sums, parts, strict=True):
            part.copy_(values)
    for total, values in zip(totals, parts, strict=True):
        torch.testing.assert_close(total[0], values.sum(0))
    assert grids == [(1, 2)]


# 4 programs of one processor: with one to each sample a norm has nothing to add up
@pytest.mark.parametrize(("processors", "samples"), [(1, 3), (1, 4), (3, 2)])
@pytest.mark.parametrize(("mlp", "qk_norm"), [("gelu", False), ("swiglu", True)])
def test_a_layer_s_launchers_allocate_what_is_counted(mlp, qk_norm, processors, samples):
    layer = OneLayer(samples, T, D, H, hidden=4 * D, mlp=mlp, qk_norm=qk_norm)
    with use_implementation("triton"), dry_run_on_gpu(processors), Scratch() as scratch:
        layer.run(layer.leaves()).sum().backward()
    assert ("gated_adaln_norm_bwd" in scratch.bytes) == (samples < 4)
    assert scratch.bytes == scratch.allocated


@pytest.mark.parametrize("elements", [1024, 1025, 3000])
def test_the_score_loss_allocates_what_is_counted(elements):
    z0 = torch.ones(3, elements)
    with use_implementation("triton"), Scratch() as scratch:
        score_loss(z0, z0, torch.ones(3), torch.ones(3), Draw(0, 0))
    expected = {"score_loss_fwd": FLOAT32 * 3 * -(-elements // 1024)} if elements > 1024 else {}
    assert scratch.bytes == scratch.allocated == expected
