import itertools
import os
from dataclasses import replace

import pytest
from planning.reckoned import MiB, reckoned, wide

from dbkernels.cli.profile import Profile
from dbkernels.memory.allocator import TARGETS
from dbkernels.models import DiTConfig
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning import search as module
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import Recipe, of_preset
from dbkernels.planning.search import estimate, plans_of, search, seconds_of
from dbkernels.training.lora_config import LoraConfig

TINY = DiTConfig(dim=32, depth=4, num_heads=2, image_size=8, channels=1, num_classes=10)
SMALL = Recipe("dit", "", TINY, batch_size=8)
BATCH = 64
# all policies differ in autocast alone
LARGE = replace(of_preset("dit", "digits"), batch_size=BATCH, autocast=True)
EVEN = {"none": 100, "attention": 105, "mlp": 115, "qkv": 120, "layer": 133, "layer_narrow": 133}
# a policy may compute more than the next one, where neither redoes all of the other's
UNEVEN = {"none": 100, "attention": 130, "mlp": 104, "qkv": 240, "layer": 260, "layer_narrow": 260}
PIECE = 3  # of the time of a sweep, for every micro-batch


def chosen(recipe):
    """What a search chooses, beside offload."""
    return recipe.num_blocks, recipe.recompute, recipe.micro_batch


class Predictor:
    """Reckons, with other times; knows what it was asked."""

    def __init__(self, flops):
        self.flops, self.asked = flops, []

    def __call__(self, recipe):
        self.asked.append(chosen(recipe))
        seconds = self.flops[recipe.recompute] + PIECE * recipe.accumulate
        found = reckoned(recipe)
        return {k: replace(v, seconds=seconds + 2 * (k == "cpu")) for k, v in found.items()}


def plans(num_blocks, limit, flops=EVEN):
    predict = Predictor(flops)
    return plans_of(replace(LARGE, num_blocks=num_blocks), predict, limit * MiB), predict


def tried_out(num_blocks, limit, flops):
    """The fastest of all that fit, by trying each."""
    predict, recipe = Predictor(flops), replace(LARGE, num_blocks=num_blocks)
    pieces = [2**power for power in range(7)]
    every = itertools.product(POLICIES, pieces)
    found = [predict(replace(recipe, recompute=one, accumulate=cut)) for one, cut in every]
    for offload in ("none",) if num_blocks == 1 else ("none", "cpu"):
        fitting = [each[offload] for each in found if each[offload].peak_bytes <= limit * MiB]
        if fitting:
            yield min(plan.seconds for plan in fitting), offload


# the plans of one number of blocks


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("limit", [0, 60, 200, 380, 390, 420, 630, 700, 1200, 3000, 9000])
@pytest.mark.parametrize("flops", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_finds_the_fastest_that_fits_and_asks_for_each_once(num_blocks, limit, flops):
    found, predict = plans(num_blocks, limit, flops)
    best = [(plan.seconds, plan.recipe.offload) for plan in found.plans]
    assert best == list(tried_out(num_blocks, limit, flops))
    assert all(plan.peak_bytes <= limit * MiB for plan in found.plans)
    assert all(plan.recipe.num_blocks == num_blocks for plan in found.plans)
    assert len(set(predict.asked)) == len(predict.asked)


def test_where_everything_fits_one_prediction_does():
    found, predict = plans(4, 10**6)
    assert predict.asked == [(4, "none", BATCH)]
    whole = replace(LARGE, num_blocks=4)
    assert [plan.recipe for plan in found.plans] == [whole, replace(whole, offload="cpu")]
    assert [plan.recipe for plan in plans(1, 10**6)[0].plans] == [LARGE], "one way, not two"


def test_where_nothing_fits_two_predictions_do_and_the_smallest_is_named():
    found, predict = plans(4, 0)
    assert predict.asked == [(4, "none", BATCH), (4, "layer_narrow", 1)]
    assert found.plans == []
    assert chosen(found.smallest.recipe) == (4, "layer_narrow", 1)
    assert (found.smallest.recipe.offload, found.whole.recipe.offload) == ("cpu", "none")


@pytest.mark.parametrize("num_blocks, limit, most", [(1, 420, 15), (2, 3000, 5), (4, 200, 16)])
def test_few_predictions_find_a_micro_batch(num_blocks, limit, most):
    assert len(plans(num_blocks, limit)[1].asked) <= most, "of 42 that there are"


# the search of all


def test_the_numbers_of_blocks_are_those_that_pages_show_and_those_that_cut_evenly():
    assert module.counts_of(28) == [1, 2, 3, 4, 6, 7, 14, 28]
    assert module.counts_of(12) == [1, 2, 3, 4, 6, 12]
    assert module.counts_of(5) == [1, 2, 3, 4, 5]
    shown = {int(n) for n in Profile.num_blocks.split(",")}
    assert shown <= set(module.counts_of(28)) and shown <= set(module.counts_of(12))


def test_the_parts_of_a_search_are_told_as_they_come(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(module, "estimate", reckoned)
    heard = []
    recipe = replace(LARGE, autocast=False, device=TARGETS["cpu"])
    answer = search(recipe, 1000 * MiB, lambda *each: heard.append(each))
    counts = module.counts_of(12)
    assert [done for done, *_ in heard] == [*range(1, heard[0][1] + 1)]
    found = [part for *_, part in heard if part]
    assert [part.whole.recipe.num_blocks for part in found] == counts
    assert [part for *_, part in heard[len(counts) :]] == [None] * (len(heard) - len(counts))
    assert sorted(id(plan) for part in found for plan in part.plans) == sorted(
        map(id, answer.plans)
    )


def test_the_largest_preset_has_the_widest_and_most_layers(monkeypatch):
    def largest(memory):
        return search(replace(LARGE, autocast=False, device=TARGETS["cpu"]), memory * MiB).largest

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(module, "estimate", reckoned)
    assert largest(48) == "XL/2"
    monkeypatch.setattr(module, "estimate", wide)
    found = [largest(memory) for memory in (1151, 1024, 400, 64)]
    assert found == ["L/2", "L/2", "S/2", "digits"]


OF_TEXT = replace(of_preset("mmdit", "small"), batch_size=2)


@pytest.mark.parametrize(
    "recipe",
    [SMALL, replace(SMALL, optimizer="muon"), OF_TEXT, replace(SMALL, lora=LoraConfig(2))],
    ids=["dit", "muon", "mmdit", "lora"],
)
def test_stem_and_head_are_what_no_number_of_blocks_divides(recipe):
    whole, model = estimate(recipe)["none"], recipe.config().build("cpu").model
    within = set(model.layers.parameters())
    own = [p for p in model.parameters() if p not in within]
    outside = module.outside_layers(whole)
    assert outside["parameters"] == sum(p.nbytes for p in own)
    # two moments; what counts the steps is much beside weights as small as these
    moments = 2 * sum(p.nbytes for p in own if p.requires_grad)
    assert moments <= outside["optimizer"] <= 1.1 * moments
    found = module.shares(whole, outside)
    assert found["stem_and_head"] == sum(outside.values()) and min(found.values()) >= 0
    assert sum(found.values()) == whole.peak_bytes


# the estimates of bytes and time


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_two_micro_batches_tell_of_all(pieces):
    recipe = replace(SMALL, num_blocks=2, accumulate=pieces)
    found, steps = estimate(recipe), dry_run(recipe)
    for offload, step in steps.items():
        assert found[offload].recipe == replace(recipe, offload=offload)
        assert found[offload].peak_bytes == step.peak_reserved_bytes
        assert found[offload].flops == 2 * step.flops
        # what clips the gradient and updates is counted with every micro-batch
        swapped = module.swapped_bytes(steps, recipe) if offload == "cpu" else 0
        least, most = (
            seconds_of(recipe, 2 * step.flops, 2 * ops, swapped)
            for ops in (len(step.trace.ops), 1.1 * len(step.trace.ops))
        )
        assert least <= found[offload].seconds < most
        if pieces == 2:
            assert found[offload].by_category == step.by_category


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_an_optimizer_steps_once_however_a_batch_is_cut(num_blocks):
    """Of Muon, whose steps have matmuls."""
    plain = replace(SMALL, num_blocks=num_blocks)
    recipe = replace(plain, optimizer="muon")
    whole, cut, adamw = (
        estimate(each)["none"] for each in (recipe, replace(recipe, accumulate=8), plain)
    )
    # as many samples, one micro-batch after another
    assert cut.flops == whole.flops > 1.5 * adamw.flops
    traces = [
        dry_run(each)["none"].trace
        for each in (recipe, plain, replace(recipe, batch_size=2, accumulate=2))
    ]
    assert traces[0].updating == traces[2].updating == traces[0].flops - traces[1].flops
    ops = traces[2].ops
    assert traces[2].updates == len([op for op in ops if op.startswith("optimizer: ")]) > 100
    once = 5e-6 * num_blocks * (4 * len(ops) - 3 * traces[2].updates)
    working = cut.flops / (0.5 * SMALL.device.speeds[0])
    assert cut.seconds == pytest.approx(once + working, rel=1e-3)


@pytest.mark.parametrize("num_blocks", [1, 3, 4])
def test_a_sweep_swaps_every_layer_in_and_out(num_blocks):
    recipe = replace(SMALL, num_blocks=num_blocks)
    swapped = module.swapped_bytes(dry_run(recipe), recipe)
    layers = SMALL.config().build("cpu").model.layers
    others = 2 * 3 * sum(p.nbytes for p in layers.parameters()) if num_blocks > 1 else 0
    # the allocator rounds each tensor up, and every parameter has a count of steps
    tensors = 4 * len(list(layers.parameters())) if num_blocks > 1 else 0
    assert 0 <= swapped - others <= 2 * 512 * tensors


def test_time_is_operations_and_calls_and_swaps():
    device = replace(TARGETS["h100"], speeds=(2e12, 2e13, 2e9))
    recipe = replace(SMALL, num_blocks=4, device=device)
    assert seconds_of(recipe, 10**12, 1000, 0) == pytest.approx(1.005)
    assert seconds_of(replace(recipe, autocast=True), 10**12, 1000, 0) == pytest.approx(0.105)
    # swaps take a twentieth of the time at most
    assert seconds_of(recipe, 10**12, 0, 10**10) == pytest.approx(1 / 0.95, rel=0.001)
    assert seconds_of(recipe, 10**12, 0, 10**6) == pytest.approx(1.001)
