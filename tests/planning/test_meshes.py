from dataclasses import replace

import pytest
from planning.two_trainers import DIT, THROUGH

from dbkernels.memory.allocator import TARGETS
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.ops.layer.recompute import POLICIES, policies_of
from dbkernels.planning import meshes as module
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.meshes import meshes, search_meshes
from dbkernels.planning.recipe import Recipe
from dbkernels.planning.search import CONTEXT, Estimate, counts_of, outside_layers
from dbkernels.training.lora_config import LoraConfig

GiB = 2**30
ONE = Recipe("dit", "", DIT, batch_size=8, device=TARGETS["cpu"])


def reckoned(recipe):
    """64 GiB for each layer, which devices share, and one for a sample, unit and layer."""
    layers = recipe.model.depth // (recipe.num_blocks if recipe.is_apart else 1)
    units = POLICIES[recipe.recompute].units
    sizes = {
        "parameters": 64 * layers / recipe.tensor_parallel / recipe.data_parallel**recipe.shard,
        "saved_activations": recipe.micro_batch * units * layers / recipe.tensor_parallel,
    }
    found = {name: int(GiB * sizes.get(name, 0)) for name in CATEGORIES}
    work = recipe.share * (40 - units) / recipe.tensor_parallel + recipe.accumulate
    return {"none": Estimate(recipe, sum(found.values()), found, 10**12, work)}


@pytest.fixture
def searched(monkeypatch):
    """What is found, of each plan: blocks, those side by side, data, tensor, and the bytes."""
    monkeypatch.setattr(module, "estimate", reckoned)
    monkeypatch.setattr(module, "results", lambda jobs: (job() for job in jobs))

    def search(recipe, devices, memory):
        answer = search_meshes(recipe, devices, memory)
        plans = [(p.recipe.num_blocks, p.side_by_side, *shape(p.recipe)) for p in answer.plans]
        return answer, plans

    return search


def shape(recipe):
    return recipe.data_parallel, recipe.tensor_parallel


def test_blocks_side_by_side_come_first_and_then_few_devices_to_a_layer():
    found = list(meshes(replace(ONE, num_blocks=4), 8, (1, 2, 4)))
    assert [(blocks, *shape(recipe)) for recipe, blocks in found] == [
        (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1), (1, 4, 2), (1, 2, 4),
    ]  # fmt: skip
    assert all(recipe.shard == (recipe.data_parallel > 1) for recipe, _ in found)
    assert all(recipe.is_apart for recipe, _ in found)
    # a batch is shared evenly, and so are devices
    found = list(meshes(replace(ONE, num_blocks=2, batch_size=6), 12, (1, 2, 4)))
    assert [(blocks, *shape(recipe)) for recipe, blocks in found] == [
        (2, 6, 1), (2, 3, 2), (1, 6, 2), (1, 3, 4),
    ]  # fmt: skip


def test_one_device_to_a_block_has_that_block_alone():
    ((recipe, blocks), *_) = meshes(replace(ONE, num_blocks=4), 4, (1,))
    assert (blocks, recipe.devices, recipe.shard) == (4, 1, False)
    assert recipe.is_apart and recipe.config().partition.sharing == "copies"
    assert recipe.offloads == ("none",)
    whole, alone = (dry_run(each)["none"] for each in (replace(recipe, alone=False), recipe))
    assert alone.by_category["optimizer"] < 0.4 * whole.by_category["optimizer"]


def test_the_first_mesh_of_which_a_plan_fits_is_taken(searched):
    answer, plans = searched(ONE, 8, 150 * GiB)
    assert sorted(plans) == [(1, 1, 8, 1), (2, 2, 4, 1), (3, 1, 8, 1), (4, 4, 2, 1)]
    assert all(plan.peak_bytes <= 150 * GiB for plan in answer.plans)
    assert [p.seconds for p in answer.plans] == sorted(p.seconds for p in answer.plans)
    # what is side by side is done sooner
    for plan in answer.plans:
        assert plan.seconds == reckoned(plan.recipe)["none"].seconds / plan.side_by_side
    # a layer and a sample of a block have room where four devices share a layer
    answer, plans = searched(replace(ONE, batch_size=2), 8, 45 * GiB)
    assert sorted(plans) == [(1, 1, 2, 4), (2, 2, 2, 2), (3, 1, 2, 4), (4, 4, 2, 1)]
    assert answer.whole.recipe == replace(
        ONE, batch_size=2, data_parallel=2, tensor_parallel=4, shard=True
    )
    # with two side by side, each has twice the devices
    _, plans = searched(replace(ONE, batch_size=2), 8, 20 * GiB)
    assert sorted(plans) == [(2, 1, 2, 4), (3, 1, 2, 4), (4, 2, 2, 2)]


def test_what_does_not_fit_is_told_with_the_least_that_was_found(searched):
    answer, plans = searched(ONE, 2, GiB)
    assert plans == [] and answer.largest is None
    least = answer.smallest
    assert (least.recipe.micro_batch, least.recipe.devices) == (1, 2)
    assert least.recipe.recompute == policies_of(mixed=False)[-1]
    assert 32 * GiB < least.peak_bytes < 34 * GiB  # half of one layer
    # a GPU's context has no room for it either
    gpu, enough = replace(ONE, device=TARGETS["h100"]), least.peak_bytes + CONTEXT
    assert searched(gpu, 2, enough)[1] and not searched(gpu, 2, enough - 1)[1]


@pytest.mark.parametrize(
    "recipe, devices, counts, shapes",
    [
        # heads of 4 are not cut among 8
        (replace(ONE, batch_size=1), 4, {1, 2, 3, 4}, {(1, 1), (1, 2), (1, 4)}),
        # an optimizer that needs whole matrices
        (replace(ONE, optimizer="muon"), 4, {1, 2, 3, 4}, {(4, 1), (2, 1), (1, 1)}),
        # blocks that read layers of each other
        (Recipe("ar", "", THROUGH, batch_size=8, device=TARGETS["cpu"]), 4, {1}, {(4, 1)}),
    ],
)
def test_meshes_are_those_that_a_model_and_an_optimizer_can_have(
    recipe, devices, counts, shapes, searched
):
    answer, plans = searched(recipe, devices, 10**6 * GiB)
    assert {count for count, *_ in plans} == counts
    assert {(data, tensor) for *_, data, tensor in plans} == shapes
    whole = recipe.optimizer != "adamw"
    shared = [plan.recipe for plan in answer.plans]
    assert all(each.shard == (each.data_parallel > 1 and not whole) for each in shared)


def test_rejects_what_devices_cannot_share(searched):
    with pytest.raises(ValueError, match="lora must be 0 for several devices, got 4"):
        searched(replace(ONE, lora=LoraConfig(4)), 2, GiB)
    with pytest.raises(ValueError, match=r"batch must be .* of 5 devices, .* at most 4 .* got 8"):
        searched(ONE, 5, GiB)


def test_a_search_predicts_real_steps(monkeypatch):
    monkeypatch.setattr(module, "counts_of", lambda depth: counts_of(depth)[1:2])
    told = []
    # two blocks, each on two devices
    answer = search_meshes(ONE, 4, GiB, lambda *given: told.append(given))
    (plan,) = answer.plans
    assert (plan.side_by_side, *shape(plan.recipe), plan.recipe.num_blocks) == (2, 2, 1, 2)
    assert plan.peak_bytes == dry_run(plan.recipe)["none"].peak_reserved_bytes
    assert [given[:2] for given in told] == [(1, 1)]
    # a device has half of the stem and the head
    all_of_it = outside_layers(replace(plan, recipe=replace(plan.recipe, shard=False)))
    assert answer.outside == {name: size // 2 for name, size in all_of_it.items()}
    assert 0 < answer.outside["parameters"] < plan.by_category["parameters"]
