import numpy as np
import pytest
import torch

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.training.partition import block_at, partition

PRIOR = LogNormal()


def served(levels, num_blocks):
    blocks = partition(12, num_blocks, PRIOR)
    return [block_at(blocks, level).index for level in levels]


@pytest.mark.parametrize(
    ("depth", "split", "sizes"),
    [
        (12, None, [4, 4, 4]),
        (13, None, [5, 4, 4]),
        (14, None, [5, 5, 4]),
        (7, None, [3, 2, 2]),
        (3, None, [1, 1, 1]),
        (12, [3, 6, 3], [3, 6, 3]),
        (12, [2, 4, 6], [2, 4, 6]),
    ],
)
def test_block_0_has_the_first_layers_and_the_most_noise_and_no_layer_is_dropped(
    depth, split, sizes
):
    blocks = partition(depth, 3, PRIOR, split=split)
    assert [len(block.layers) for block in blocks] == sizes
    assert sum((block.layers for block in blocks), ()) == tuple(range(depth))
    assert [block.index for block in blocks] == [0, 1, 2]
    assert blocks[0].noise.high == 80 and blocks[2].noise.low == 0.002


@pytest.mark.parametrize("split", [None, [2, 3, 1]])
def test_the_deepest_layers_may_meet_the_most_noise_and_routing_follows(split):
    blocks = partition(6, 3, PRIOR, split=split, noise_order="deepest")
    first = partition(6, 3, PRIOR, split=split)
    assert [block.noise for block in blocks] == [block.noise for block in first]
    assert [len(block.layers) for block in blocks] == [len(block.layers) for block in first]
    assert sum((block.layers for block in reversed(blocks)), ()) == tuple(range(6))
    assert block_at(blocks, 80.0).layers[-1] == 5 and block_at(blocks, 0.002).layers[0] == 0


def test_every_trained_level_without_overlap_is_served_by_its_block():
    blocks = partition(12, 6, PRIOR, gamma=0.0)
    for block in blocks:
        sigma = PRIOR.level_at(block.trained_noise, torch.rand(500, dtype=torch.float64))
        assert {block_at(blocks, level).index for level in sigma.tolist()} == {block.index}


def test_a_boundary_begins_the_interval_below_it():
    assert served(PRIOR.grid(4), 3) == [0, 1, 2, 2]
    assert served([80.0, 0.50504, 0.505042, 0.002], 3) == [0, 1, 0, 2]


def test_a_boundary_keeps_its_block_as_float32():
    levels = PRIOR.grid(13)
    rounded = np.array(levels, dtype=np.float32).tolist()
    for num_blocks in (2, 3, 4, 6, 12):
        assert served(rounded, num_blocks) == served(levels, num_blocks)


def test_the_cdf_grid_uses_blocks_equally_and_the_karras_grid_does_not():
    count = lambda levels, n: np.bincount(served(levels, n)).tolist()  # noqa: E731
    assert count(PRIOR.grid(50), 3) == [17, 16, 17]
    assert count(PRIOR.grid(50), 4) == [13, 12, 12, 13]
    assert count(PRIOR.grid(50, "karras"), 3) == [33, 4, 13]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition(2, 3, PRIOR), "between 1 and the 2 layers, got 3"),
        (lambda: partition(2, 0, PRIOR), "between 1 and the 2 layers, got 0"),
        (lambda: partition(12, 3, PRIOR, split=[4, 4, 5]), "add up to 12 layers, got .* sum 13"),
        (lambda: partition(12, 3, PRIOR, split=[6, 6]), "must give 3 blocks"),
        (lambda: partition(12, 3, PRIOR, split=[0, 6, 6]), "at least one layer each"),
        (lambda: partition(12, 3, PRIOR, gamma=-0.05), "gamma must be finite and at least 0"),
        (lambda: partition(12, 3, PRIOR, scheme="cubic"), "scheme must be one of"),
        (
            lambda: partition(12, 3, PRIOR, noise_order="last"),
            "noise_order must be one of first, deepest, got last",
        ),
        (lambda: block_at(partition(12, 3, PRIOR), 80.1), r"must lie in \[0.002, 80.0\], got 80.1"),
        (lambda: block_at(partition(12, 3, PRIOR), 0.0019), "level must lie in"),
        (lambda: block_at(partition(12, 3, PRIOR), float("nan")), "level must lie in"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
