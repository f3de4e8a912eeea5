"""Slices of parameters that ranks have, and the whole again."""

import re

import pytest
import torch

from dbkernels.models import Cut

CUTS = [Cut(0), Cut(1), Cut(0, 2), Cut(0, 3)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(36, 24), (36, 6, 2)])
def test_slices_join_to_the_whole(shape, size, cut):
    whole = torch.randn(shape)
    slices = [cut.of(whole, rank, size) for rank in range(size)]
    assert torch.equal(cut.join(slices), whole)
    for own in slices:
        assert own.is_contiguous() and own.numel() == whole.numel() // size
        assert own.untyped_storage().nbytes() == own.nbytes


def test_each_part_is_cut_for_itself():
    whole = torch.arange(12)
    assert Cut(0).of(whole, 1, 2).tolist() == [6, 7, 8, 9, 10, 11]
    assert Cut(0, 3).of(whole, 1, 2).tolist() == [2, 3, 6, 7, 10, 11]
    assert Cut(1).of(whole.view(2, 6), 2, 3).tolist() == [[4, 5], [10, 11]]


@pytest.mark.parametrize(
    ("cut", "shape", "rank", "message"),
    [
        (Cut(0, 3), (8, 2), 0, "whole must have a multiple of 3 * 2 along dimension 0, got (8, 2)"),
        (Cut(1), (8, 3), 0, "whole must have a multiple of 1 * 2 along dimension 1, got (8, 3)"),
        (Cut(1), (8,), 0, "whole must have a multiple of 1 * 2 along dimension 1, got (8,)"),
        (Cut(0), (8,), 2, "rank must be from 0 to 1, got 2"),
        (Cut(0), (8,), -1, "rank must be from 0 to 1, got -1"),
    ],
)
def test_a_cut_refuses_what_ranks_cannot_share(cut, shape, rank, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cut.of(torch.zeros(shape), rank, 2)
