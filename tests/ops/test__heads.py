import pytest
import torch

from dbkernels.ops._heads import angles, head_tile, launch, queries_and_keys, rotate
from dbkernels.ops.backend import tile


@pytest.mark.parametrize("d", [1, 2, 7, 32, 64, 72, 96, 128, 256, 1024])
def test_a_tile_gives_every_thread_eight_lanes_of_each_half(d):
    tile = head_tile(d)
    half = (d + 1) // 2
    assert half <= tile.BLOCK_D < 2 * half
    assert 32 * 8 * tile.num_warps == tile.BLOCK_T * tile.BLOCK_D


@pytest.mark.parametrize("registers", [64, 128])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 50), (2, 1000)])
def test_one_wave_of_programs_shares_all_tokens(B, T, registers, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: 3)
    asked = launch(torch.empty(B, T, 3 * 2 * 8), 2, registers)
    assert asked.options["HEAD_DIM"] == 8 and asked.options["maxnreg"] == registers
    assert 0 <= asked.programs * asked.tokens_per_program - B * T < asked.tokens_per_program
    # of queries and of keys
    assert 2 * asked.programs <= 3 * 65536 // (128 * registers)


def test_queries_and_keys_are_views_without_the_values():
    qkv = torch.arange(2 * 3 * 24.0).view(2, 3, 24)
    qk = queries_and_keys(qkv, 2)
    assert qk.shape == (2, 3, 2, 2, 4)
    assert torch.equal(qk.flatten(2), qkv[..., :16])
    assert qk.data_ptr() == qkv.data_ptr()


def test_a_quarter_turn_swaps_the_halves():
    cos, sin = angles(torch.stack([torch.zeros(1, 4), torch.ones(1, 4)]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 1, 4)
    assert rotate(x, cos, sin).flatten().tolist() == [-3, -4, 1, 2]
    assert torch.equal(rotate(rotate(x, cos, sin), cos, -sin), x)
