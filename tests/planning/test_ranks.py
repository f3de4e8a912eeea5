import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from planning.two_trainers import DATA, ONE, RECIPES, SHARD, THROUGH, work

from dbkernels.planning import dry_run as module
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.ranks import fake_ranks
from dbkernels.pool import processes


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


# a rank of a recipe


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Growth of the allocator in a step, and bytes of parameters, state and averages, by rank."""
    folder = tmp_path_factory.mktemp("trainers")
    args = f"file://{folder / 'rendezvous'}", str(folder)
    torch.multiprocessing.spawn(work, args=args, nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def start_of(prediction):
    """What is there before the first op."""
    return [moment for moment in prediction.trace.moments() if moment.op < 0][-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_finds_what_a_real_rank_holds_and_allocates(name, measured):
    prediction = dry_run(RECIPES[name])["none"]
    (growth, *held), (other, *_) = measured[0][name], measured[1][name]
    start = start_of(prediction)
    sizes = [start.by_category[category] for category in ("parameters", "optimizer", "inputs")]
    assert sizes[:2] == held[:2] and sizes[2] == pytest.approx(held[2], abs=16)  # and the draw
    # a first step makes a few numbers; a CPU's attention allocates inside itself
    found = prediction.peak_allocated_bytes - start.total_bytes
    assert found == pytest.approx(growth, rel=1.5e-3) == other


def layers_of(recipe):
    return sum(p.nbytes for p in recipe.config().build("cpu").model.layers.parameters())


def test_ranks_share_parameters_and_optimizer_as_they_are_told():
    def held(recipe):
        start = start_of(dry_run(recipe)["none"]).by_category
        return start["parameters"], start["optimizer"]

    one, data, shard = map(held, (ONE, DATA, SHARD))
    assert data == one
    assert shard == pytest.approx([size / 2 for size in one], rel=1e-3)
    eight = held(replace(SHARD, data_parallel=8))
    assert eight == pytest.approx([size / 8 for size in one], rel=2e-2)  # rows are padded
    # a process of one block has that block and its own stem and head
    alone = held(replace(SHARD, num_blocks=2))
    assert shard[0] - alone[0] == pytest.approx(layers_of(ONE) / 4, rel=1e-3)
    both = held(replace(SHARD, tensor_parallel=2))
    tensor = held(replace(ONE, tensor_parallel=2))
    assert both == pytest.approx([size / 2 for size in tensor], rel=2e-3)


def test_ranks_share_a_batch():
    whole, half = (dry_run(recipe)["none"] for recipe in (replace(ONE, batch_size=4), DATA))
    assert half.saved_bytes == whole.saved_bytes and half.flops == whole.flops


def test_the_costliest_block_is_predicted_alone(monkeypatch):
    asked = []
    made = module.Recipe.trainer
    monkeypatch.setattr(
        module.Recipe,
        "trainer",
        lambda self, *given: asked.append(given[1].block) or made(self, *given),
    )
    found = dry_run(replace(SHARD, num_blocks=2, split=(1, 3)))["none"]
    assert asked == [1]
    even = dry_run(replace(SHARD, num_blocks=2))["none"]
    assert asked == [1, 0]
    assert found.flops > even.flops and found.peak_allocated_bytes > even.peak_allocated_bytes


def test_blocks_that_read_layers_of_each_other_stay_in_one_job():
    recipe = replace(SHARD, family="ar", model=THROUGH, num_blocks=2)
    assert not recipe.is_apart and recipe.config().partition.sharing == "joint"
    start = start_of(dry_run(recipe)["none"]).by_category
    one = start_of(dry_run(replace(recipe, num_blocks=1))["none"]).by_category
    # all blocks are there
    assert start["optimizer"] == pytest.approx(one["optimizer"], rel=1e-3)


def test_a_dry_run_leaves_no_process_group_behind():
    dry_run(SHARD)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="optimizer must be adamw"):
        dry_run(replace(SHARD, optimizer="muon"))
    assert not dist.is_initialized()
    with fake_ranks(2), pytest.raises(ValueError, match="no process group is open"):
        dry_run(SHARD)


def test_a_process_of_a_pool_predicts_a_rank_as_this_one_does():
    here = dry_run(SHARD)["none"]
    with processes(1) as pool:
        there = pool.submit(module._bare, SHARD).result()["none"]
    assert there == here
