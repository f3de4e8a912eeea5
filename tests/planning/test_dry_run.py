from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from memory.steps import allocator_peak

from dbkernels.data.images import batch_indices
from dbkernels.memory.allocator import TARGETS, MiB
from dbkernels.memory.measure import MEASURED, measure_peak
from dbkernels.models import (
    FAMILIES,
    ARConfig,
    DiTConfig,
    HuginnConfig,
    MDMConfig,
    MMDiTConfig,
    stem_and_head,
)
from dbkernels.ops.backend.register import registered
from dbkernels.ops.layer.recompute import policies_of
from dbkernels.planning import dry_run as module
from dbkernels.planning.dry_run import dry_run, predicted, sweep_flops
from dbkernels.planning.recipe import OFFLOAD, Recipe, of_preset
from dbkernels.training.run_config import RunConfig

DIT = DiTConfig(dim=64, depth=4, num_heads=4, image_size=8, channels=4, num_classes=10)
VIT = replace(FAMILIES["vit"].model.preset("digits"), depth=4)
TEXT = {"dim": 64, "depth": 4, "num_heads": 4, "mlp_hidden": 176, "cond_dim": 16}
TEXT |= {"length": 40, "vocabulary": 50}
MODELS = {
    "dit": DIT,
    "vit": VIT,
    "mmdit": MMDiTConfig(
        dim=64,
        depth=4,
        num_heads=4,
        parallel=2,
        image_size=8,
        channels=4,
        text_length=5,
        text_dim=24,
        pooled_dim=8,
    ),
    "mdm": MDMConfig(**TEXT),
    "ar": ARConfig(**TEXT, next_token_weight=0.0),
    # the number of recurrences is another in every step, that of the gradients is not
    "huginn": HuginnConfig(**TEXT, prelude=1, coda=1, recurrences=40, truncation=2),
}
THROUGH = ARConfig(**TEXT, clean="through")
FUSED = Recipe("dit", "", DIT, batch_size=8, num_blocks=2, device=TARGETS["cpu"])
PLAIN = replace(FUSED, method="end_to_end", num_blocks=1, recompute=None)
ENDS = [
    PLAIN,
    replace(PLAIN, method="block_stock", num_blocks=2),
    replace(PLAIN, method="checkpointed"),
    replace(PLAIN, method="selective"),
]
LADDER = [replace(FUSED, recompute=recompute) for recompute in policies_of(mixed=False)]
ROWS = [
    *ENDS,
    *LADDER,
    replace(FUSED, model=replace(DIT, process="vp", prediction="v")),
    # the second block runs more, though it has no more layers
    replace(FUSED, layers=(0, 1, 2, 3, 2, 2), split=(2, 4)),
    *(
        replace(recipe, family=family, model=MODELS[family])
        for family in ("mmdit", "mdm", "ar", "huginn")
        for recipe in (FUSED, PLAIN)
    ),
    # the second block runs the layers of the first too
    replace(FUSED, family="ar", model=THROUGH),
]


def named(recipe):
    return f"{recipe.family}-{recipe.method}-{recipe.recompute}-{recipe.num_blocks}-{recipe.layers}"


def real_trainer(recipe, steps=1):
    """A trainer in its steady state, on blank data: its numbers are not read."""
    trainer = recipe.trainer("cpu")
    for block in list(trainer.blocks) * steps:
        trainer.advance(block)
    return trainer


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def layer_bytes(trainer):
    return nbytes(trainer.blocks.model.layers[0].parameters())


@pytest.fixture
def hollow_ops():
    """Ops that write nothing, as a kernel allocates nothing; plain torch inside them would."""
    library = torch.library.Library("dbkernels", "IMPL")
    for name in registered():
        library.impl(name, lambda *_: None, "CPU")
    yield
    library._destroy()


# against the CPU's allocator, which no dispatch mode feeds, and the tracker on real tensors


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recipe", ROWS, ids=named)
def test_a_step_peaks_as_predicted(recipe, autocast, hollow_ops):
    recipe = replace(recipe, autocast=autocast)
    expected = dry_run(recipe)["none"]
    # a bfloat16 matmul of oneDNN has buffers inside, which no GPU has
    with torch.backends.mkldnn.flags(enabled=False):
        trainer = real_trainer(recipe)
        optimizers = [o for group in trainer.groups.values() for o in group.optimizers]
        state = [t for group in trainer.groups.values() for t in group.optimizer_tensors().values()]
        resident = nbytes([*trainer.blocks.parameters(), *trainer.blocks.buffers(), *state])
        steps = [partial(trainer.advance, block) for block in trainer.blocks]
        highest = resident + max(map(allocator_peak, steps))
        peaks = [measure_peak(s, model=trainer.blocks, optimizers=optimizers) for s in steps]
    assert abs(expected.peak_allocated_bytes - highest) <= 0.005 * highest
    assert expected.peak_reserved_bytes == expected.peak_allocated_bytes
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    assert expected.saved_bytes == worst.saved_bytes and expected.at == worst.at
    for name in MEASURED:
        # a scalar or two more: fake tensors have their norms one by one
        assert abs(expected.by_category[name] - worst.by_category[name]) <= 256, name


@pytest.mark.parametrize("early", [False, True], ids=["after", "in backward"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit", "adamw4bit"])
def test_a_step_peaks_as_predicted_with_another_optimizer(optimizer, offload, early, hollow_ops):
    if optimizer != "muon":
        pytest.importorskip("torchao")
    digits = replace(of_preset("vit", "digits"), optimizer=optimizer, optimizer_in_backward=early)
    recipe = replace(digits, num_blocks=3, batch_size=16, device=FUSED.device)
    expected = dry_run(recipe)[offload]
    with torch.backends.mkldnn.flags(enabled=False):
        trainer = real_trainer(recipe)
        groups = trainer.groups.values()
        if offload == "cpu":
            groups = [trainer.groups["block0"], trainer.groups["shared"]]
        state = [t for group in groups for t in group.optimizer_tensors().values()]
        parameters = [p for group in groups for p in group.parameters.values()]
        resident = nbytes([*parameters, *trainer.blocks.buffers(), *state])
        highest = resident + allocator_peak(partial(trainer.advance, trainer.blocks[0]))
    assert abs(expected.peak_allocated_bytes - highest) <= 0.005 * highest


# what is on the device


def test_all_blocks_on_the_device_add_what_the_step_does_not_touch():
    recipe = replace(FUSED, num_blocks=4)
    found, trainer = dry_run(recipe), real_trainer(recipe)
    others = [trainer.groups[f"block{index}"] for index in (1, 2, 3)]
    weights = nbytes(p for group in others for p in group.parameters.values())
    state = nbytes(t for group in others for t in group.optimizer_tensors().values())
    every, one = (Counter(found[place].by_category) for place in OFFLOAD)
    assert every - one == {"parameters": weights, "optimizer": state} and one <= every
    assert found["none"].flops == found["cpu"].flops
    # end to end the step touches everything
    found = dry_run(replace(FUSED, num_blocks=1))
    assert found["none"] == found["cpu"]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("family", MODELS)
def test_parameters_are_one_blocks_and_what_is_no_layer_or_all(family, sharing, monkeypatch):
    def half_frozen(config, device, only=None):
        blocks = build(config, device, only=only)
        for layer in blocks.model.layers:
            next(layer.parameters()).requires_grad_(False)
        return blocks

    build = RunConfig.build
    monkeypatch.setattr(RunConfig, "build", half_frozen)
    recipe = replace(FUSED, family=family, model=MODELS[family], num_blocks=4, sharing=sharing)
    trainer = real_trainer(recipe, steps=0)
    found, network = dry_run(replace(recipe, ema=0.9)), trainer.blocks.model
    outside = [*network.parameters(), *network.buffers()]
    # the step of the largest layer peaks highest
    others = sorted(nbytes(layer.parameters()) for layer in network.layers)[:-1]
    assert found["cpu"].by_category["parameters"] == nbytes(outside) - sum(others)
    # copies of what the blocks share too
    every = [*trainer.blocks.parameters(), *trainer.blocks.buffers()]
    assert found["none"].by_category["parameters"] == nbytes(every)


def test_averages_of_the_weights_are_there_too():
    without, with_them = (
        dry_run(replace(FUSED, ema=ema))["none"].peak_allocated_bytes for ema in (0.0, 0.9)
    )
    weights = nbytes(real_trainer(FUSED, steps=0).blocks.parameters())
    assert weights <= with_them - without <= 1.01 * weights


def test_neither_offload_nor_compilation_changes_what_is_told(monkeypatch):
    monkeypatch.setattr(stem_and_head, "_missing", lambda device: "anything")
    changes = {"offload": "cpu", "compile_stem_and_head": True, "cuda_graphs": True}
    assert dry_run(replace(FUSED, **changes)) == dry_run(FUSED)


@pytest.mark.parametrize(("split", "more"), [((2, 2), 2), ((1, 3), 3)])
def test_a_second_slot_has_room_for_the_largest_block(split, more):
    recipe = replace(FUSED, split=split, ema=0.9, offload="cpu")
    without, found = dry_run(recipe), dry_run(replace(recipe, prefetch=True))
    layer = layer_bytes(real_trainer(recipe, steps=0))
    grown = found["cpu"].peak_allocated_bytes - without["cpu"].peak_allocated_bytes
    # weights, average and both moments; the tensors of a slot are aligned
    assert 4 * more * layer <= grown <= 1.02 * 4 * more * layer
    assert found["none"] == without["none"]


# the costliest block


@pytest.mark.parametrize("split", [(1, 3), (3, 1), (2, 1, 1), (1, 1, 2)])
def test_the_costliest_block_counts_wherever_it_is(split):
    found, whole, quarter = (
        dry_run(replace(FUSED, num_blocks=count, split=cut))["none"].flops
        for count, cut in ((len(split), split), (1, None), (4, None))
    )
    # a layer's share, as many times as the longest block has layers
    assert found == whole - (4 - max(split)) * (whole - quarter) // 3


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_blocks_that_read_earlier_layers_are_all_on_the_device(num_blocks):
    own, through = (
        Recipe("ar", "", model, batch_size=8, num_blocks=num_blocks, device=TARGETS["cpu"])
        for model in (replace(THROUGH, clean="own"), THROUGH)
    )
    assert (own.offloads, through.offloads) == (OFFLOAD, ("none",))
    assert replace(through, num_blocks=1).offloads == OFFLOAD
    found, trainer = dry_run(through), real_trainer(through, steps=0)
    assert found.keys() == {"none"}
    # each parameter once, also those that two blocks read
    assert found["none"].by_category["parameters"] == nbytes(trainer.blocks.parameters())
    (alone,) = predicted([through])
    assert alone == found["none"] and alone.trace is None
    # the clean tokens of later blocks pass through all layers before, forward alone
    apart, together = (sweep_flops(recipe) for recipe in (own, through))
    assert apart == num_blocks * dry_run(own)["none"].flops
    assert together < num_blocks * found["none"].flops
    layers = sum(range(num_blocks)) * (4 // num_blocks)
    forward = 2 * 8 * 40 * (4 * 64**2 + 3 * 64 * 176 + 2 * 40 * 64)  # of a layer
    assert together - apart == pytest.approx(layers * forward, rel=0.02)


# a GPU


def test_a_gpu_has_workspaces_and_kernels_with_partial_sums():
    recipe = replace(FUSED, autocast=True, batch_size=2, device=TARGETS["h100"])
    found = dry_run(recipe)["cpu"]
    trace = found.trace
    names = {
        trace.name(event.op).partition("dbkernels::")[2]
        for event in trace.events
        if trace.categories[event.storage] == "workspaces"
    }
    assert {"gated_adaln_norm_bwd", "gelu_bwd"} <= names
    assert found.by_category["workspaces"] >= 2 * 33 * MiB
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes


def test_leaves_no_fake_order_behind():
    dry_run(FUSED)
    indices = batch_indices(8, 8, seed=0, block=0, step=0)
    assert type(indices) is torch.Tensor and sorted(indices.tolist()) == list(range(8))
    dry_run(FUSED)


# of several recipes


def test_less_is_kept_from_policy_to_policy_and_more_computed():
    ladder = list(predicted(LADDER))
    saved, flops = ([getattr(each, name) for each in ladder] for name in ("saved_bytes", "flops"))
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == len(saved)
    assert flops == sorted(flops) and len(set(flops)) == len(flops)


def test_checkpointing_runs_every_layer_again():
    whole, _, checkpointed, selective = predicted(ENDS)
    assert 1.3 < checkpointed.flops / whole.flops < 4 / 3
    assert selective.flops == whole.flops
    assert checkpointed.saved_bytes < whole.saved_bytes


def test_with_and_without_offload_take_one_dry_run_and_keep_their_order(monkeypatch):
    counted = mock.Mock(wraps=dry_run)
    monkeypatch.setattr(module, "dry_run", counted)
    recipes = [
        replace(FUSED, recompute=recompute, offload=place)
        for place in ("cpu", "none")
        for recompute in ("qkv", "none")
    ]
    found = list(predicted(recipes))
    assert [call.args[0].recompute for call in counted.call_args_list] == ["qkv", "none"]
    assert found == [dry_run(recipe)[recipe.offload] for recipe in recipes]
    assert all(each.trace is None for each in found)
