import pytest
import torch
import torch.distributed as dist

from dbkernels.planning.ranks import fake_ranks


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 1), (4096, 4095)])
def test_a_process_is_one_rank_of_many_for_a_time(world, rank):
    with fake_ranks(world, rank):
        assert (dist.get_world_size(), dist.get_rank()) == (world, rank)
        dist.all_reduce(torch.ones(1))
    assert not dist.is_initialized()


def test_an_error_within_closes_the_group():
    with pytest.raises(RuntimeError, match="within"), fake_ranks(2):
        raise RuntimeError("within")
    assert not dist.is_initialized()


@pytest.mark.parametrize("world, rank", [(2, 2), (2, -1), (0, 0)])
def test_rejects_a_rank_that_there_is_not(world, rank):
    with (
        pytest.raises(ValueError, match=rf"rank must be from 0 to .* = {world - 1}, got {rank}"),
        fake_ranks(world, rank),
    ):
        pass


def test_a_group_that_is_open_stays_open():
    with fake_ranks(3, 1):
        with (
            pytest.raises(ValueError, match="no process group is open, got one of 3 ranks over fa"),
            fake_ranks(2),
        ):
            pass
        assert (dist.get_world_size(), dist.get_rank()) == (3, 1)
