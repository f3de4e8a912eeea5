import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops.backend import columns
from dbkernels.ops.backend import tile as tile_module
from dbkernels.ops.backend.columns import ColumnTile, Share, column_tile, rows_per_column_tile
from dbkernels.ops.backend.register import use_implementation

CPU = torch.device("cpu")
FORWARD, BACKWARD = Share(4, 64), Share(2, 96)


@pytest.mark.parametrize("F", [512, 4 * 384, 4 * 768, 4 * 1024, 4 * 1152, 6144, 16384])
def test_no_lane_of_a_common_width_is_idle(F):
    assert F % column_tile(F, FORWARD).BLOCK_F == 0


@pytest.mark.parametrize("F", [1, 255, 257, 1000, 2731, 16385])
def test_fewer_than_256_lanes_of_any_width_are_idle(F):
    tile = column_tile(F, FORWARD)
    assert 0 <= triton.cdiv(F, tile.BLOCK_F) * tile.BLOCK_F - F < 256


def test_each_thread_reads_16_bytes_of_bfloat16_of_each_row_at_once():
    assert column_tile(100, BACKWARD) == ColumnTile(BLOCK_N=2, BLOCK_F=256, num_warps=1)
    assert column_tile(1536, BACKWARD) == ColumnTile(BLOCK_N=2, BLOCK_F=512, num_warps=2)
    assert column_tile(4096, FORWARD) == ColumnTile(BLOCK_N=4, BLOCK_F=1024, num_warps=4)


@pytest.mark.parametrize("N", [1, 7, 1000, 2**31])
@pytest.mark.parametrize("F", [40, 1536, 16384])
def test_programs_fill_the_device_in_one_wave_and_cover_the_rows_in_whole_tiles(N, F, monkeypatch):
    monkeypatch.setattr(tile_module, "processors", lambda device: 132)
    tile = column_tile(F, BACKWARD)
    rows = rows_per_column_tile(N, F, tile, BACKWARD, CPU)
    column_tiles, splits = triton.cdiv(F, tile.BLOCK_F), triton.cdiv(N, rows)
    assert rows % tile.BLOCK_N == 0 and rows >= tile.BLOCK_N
    fit = 132 * tile_module.programs_per_processor(96, tile.num_warps)
    assert splits * column_tiles <= fit
    # the limit of a grid's second axis
    assert splits < 2**16
    if N == 2**31:
        assert splits * column_tiles >= 0.45 * fit


def test_fewer_registers_bring_more_programs(monkeypatch):
    monkeypatch.setattr(tile_module, "processors", lambda device: 2)
    tile = column_tile(512, Share(4, 64))
    assert rows_per_column_tile(4096, 512, tile, Share(4, 64), CPU) == 128  # 16 programs of 2 warps
    assert rows_per_column_tile(4096, 512, tile, Share(4, 128), CPU) == 256


@triton.jit
def _columns_kernel(cols_ptr, rows_ptr, N, F, rows_per_program, BLOCK_F: tl.constexpr):
    cols, first, last = columns.columns(N, F, rows_per_program, BLOCK_F)
    tl.store(cols_ptr + cols, cols, mask=cols < F)
    tl.store(rows_ptr + 2 * tl.program_id(1), first)
    tl.store(rows_ptr + 2 * tl.program_id(1) + 1, last)


def test_rows_beyond_32_bits_have_their_own_number():
    cols, rows = torch.zeros(40, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    N, rows_per_program = 3 * 2**30 + 5, 2**30
    with use_implementation("triton"):
        _columns_kernel[(3, 4)](cols, rows, N, 40, rows_per_program, BLOCK_F=16)
    assert cols.tolist() == list(range(40))
    assert rows.tolist() == [[i * 2**30, min((i + 1) * 2**30, N)] for i in range(4)]


def test_chunks_cover_the_rows_once(monkeypatch):
    monkeypatch.setattr(columns, "CHUNK", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    h, du = torch.arange(33.0).view(11, 3), torch.arange(11.0).view(11, 1).bfloat16()
    parts = list(columns.chunks(2, h.bfloat16(), du, None))
    assert [part[0].shape for part in parts] == [(5, 3), (5, 3), (1, 3)]
    assert torch.equal(torch.cat([part[1] for part in parts]), du)
    for h_rows, _, none, *scratch in parts:
        assert none is None and len(scratch) == 2
        assert all(s.shape == h_rows.shape and s.dtype == torch.float32 for s in scratch)


def test_a_chunk_has_a_row_however_wide(monkeypatch):
    monkeypatch.setattr(columns, "CHUNK", 1)
    assert len(list(columns.chunks(1, torch.zeros(3, 5)))) == 3


def test_scratch_is_no_larger_than_the_tensor():
    ((_, scratch),) = columns.chunks(1, torch.zeros(3, 5))
    assert scratch.untyped_storage().nbytes() == 3 * 5 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_is_added_in_float32_to_a_copy(dtype):
    h, bias, x = (
        torch.tensor([[1.0, 2.0]]).to(dtype),
        torch.tensor([2.0**-12, 0]),
        torch.empty(1, 2),
    )
    columns.add_bias(h, bias, x)
    assert x.tolist() == [[1 + 2.0**-12, 2]]
    columns.add_bias(h, bias.to(dtype), x)
    assert x.tolist() == [[1 + 2.0**-12, 2]]
    columns.add_bias(h, None, x)
    assert x.tolist() == [[1, 2]] and x.data_ptr() != h.data_ptr()


def test_a_result_is_its_own_scratch_where_it_is_exact():
    out, scratch = torch.empty(1), torch.empty(1)
    assert columns.same_dtype(out, scratch) is out
    assert columns.same_dtype(out.bfloat16(), scratch) is scratch


def test_a_bias_of_another_width_is_refused():
    columns.check_bias(None, "F", 5)
    columns.check_bias(torch.zeros(5), "F", 5)
    with pytest.raises(ValueError, match=r"bias must be \(2 F,\) = \(6,\), got \(5,\)"):
        columns.check_bias(torch.zeros(5), "2 F", 6)
