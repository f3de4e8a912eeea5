from dataclasses import replace

import numpy as np
import pytest

from dbkernels.cli.profile import Profile
from dbkernels.cli.train import PartitionFlags, Train
from dbkernels.data.token_files import write_tokens
from dbkernels.memory.allocator import TARGETS
from dbkernels.models import FAMILIES, DiTConfig
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning.recipe import BLOCKWISE, METHODS, Recipe, of_preset, of_settings
from dbkernels.training.optimizers.registry import OPTIMIZERS
from dbkernels.training.run_config import PartitionConfig

TINY = DiTConfig(dim=16, depth=4, num_heads=2, image_size=4, channels=1, num_classes=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_are_not_given_are_those_of_train(family, tmp_path):
    smallest = FAMILIES[family].model.smallest
    made, told = of_preset(family, smallest).config(), {"data": "digits"}
    if "token" in made.model.fields():
        told["data"] = str(tmp_path / "text")
        write_tokens(told["data"], {"train": [[3] * made.model.length]}, vocabulary=27)
    elif "text" in (fields := made.model.fields()):
        told["data"] = str(tmp_path / "captions.npy")
        for name, end in (("image", ""), ("text", "_text"), ("pooled", "_pooled")):
            path = tmp_path / f"captions{end}.npy"
            np.save(path, np.zeros((2, *fields[name].shape), np.float32))
    told |= {"preset": smallest, "partition": PartitionFlags(num_blocks=1)}
    flags = Train(family=family, out=tmp_path, **told)
    trainer = replace(flags.config().trainer, steps=made.trainer.steps)
    assert made == replace(flags.config(), data="made up", trainer=trainer)


def test_a_recipe_decides_the_run():
    recipe = replace(
        of_preset("dit", "digits"), batch_size=8, autocast=True, num_blocks=4, recompute="qkv"
    )
    config = replace(recipe, layers=(1, 0, 1, 2), split=(1, 1, 1, 1)).config()
    assert config.model == replace(FAMILIES["dit"].model.preset("digits"), recompute="qkv")
    assert config.partition == PartitionConfig(4, layers="1,0,1,2", split="1,1,1,1")
    assert config.trainer.batch_size == 8
    assert config.trainer.autocast and config.trainer.clip == 1.0
    inside = replace(recipe, optimizer_in_backward=True).config().trainer
    assert (inside.optimizer_in_backward, inside.clip) == (True, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_to_end_is_the_network_without_noise_where_there_is_one(family):
    recipe = of_preset(family, "")
    ordinary = "conventional" if FAMILIES[family].conventional else "blocks"
    for method in METHODS:
        policy = "none" if method == "block_fused" else None
        way = replace(recipe, method=method, recompute=policy)
        assert way.config().objective == (ordinary if method not in BLOCKWISE else "blocks")
    asked = {"family": family, "num_blocks": "1", "methods": "end_to_end,block_stock"}
    methods = [method for method, *_ in ways(**asked)]
    # one block of plain torch is told once, where it is the same
    assert len(methods) == (1 if ordinary == "blocks" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_has_the_layers_of_its_method(method):
    recompute = "layer" if method == "block_fused" else None
    recipe = Recipe("dit", "", TINY, batch_size=2, method=method, recompute=recompute)
    trainer = recipe.trainer("cpu")
    plain = {layer.run is not None for layer in trainer.blocks.model.layers}
    assert plain == {method != "block_fused"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_row_describes_a_preset_in_full(optimizer):
    changes = {"batch_size": 3, "autocast": True, "optimizer_in_backward": True}
    changes |= {"method": "block_stock", "num_blocks": 2, "recompute": None, "offload": "cpu"}
    changes |= {"optimizer": optimizer, "device": TARGETS["a100"]}
    recipe = replace(of_preset("vit", "cifar100"), **changes)
    assert of_settings(recipe.settings()) == recipe
    # rows of before there were others say nothing of it
    assert ("optimizer" in recipe.settings()) == (optimizer != "adamw")
    assert not {"data_parallel", "tensor_parallel", "shard"} & recipe.settings().keys()
    moved = replace(recipe, offload_activations=True)
    assert moved.settings() == recipe.settings() | {"offload_activations": True}
    assert of_settings(moved.settings()) == moved
    with pytest.raises(ValueError, match='offload_activations must be bool, got "yes"'):
        of_settings(moved.settings() | {"offload_activations": "yes"})


def test_a_row_describes_the_devices_that_share_a_step():
    shared = {"data_parallel": 4, "tensor_parallel": 2, "shard": True}
    recipe = replace(of_preset("vit", "cifar100"), **shared)
    assert (recipe.devices, recipe.share, recipe.micro_batch) == (8, 32, 32)
    assert replace(recipe, accumulate=4).micro_batch == 8
    assert recipe.offloads == ("none",)
    assert shared.items() <= recipe.settings().items()
    assert of_settings(recipe.settings()) == recipe
    with pytest.raises(ValueError, match="data_parallel must be int, got true"):
        of_settings(recipe.settings() | {"data_parallel": True})
    # a process of one block has its own stem and head
    sharing = [replace(recipe, num_blocks=n).config().partition.sharing for n in (1, 2)]
    assert sharing == ["joint", "copies"]
    assert (
        replace(recipe, data_parallel=1, tensor_parallel=1, num_blocks=2).config()
        == replace(of_preset("vit", "cifar100"), num_blocks=2, shard=True).config()
    )
    assert recipe.config().trainer.shard


def ways(**flags):
    """What `profile` has a row for."""
    every = Profile(offload="cpu", batch=4, **flags).recipes()
    assert {(each.batch_size, each.offload) for each in every} == {(4, "cpu")}
    return {(each.method, each.num_blocks, each.recompute, each.budget) for each in every}


def test_every_way_has_end_to_end_once_and_blocks_for_each_number():
    assert ways(num_blocks="1,2,4") == {
        *((method, 1, None, None) for method in ("end_to_end", "checkpointed", "selective")),
        ("compiled", 1, None, 0.5),
        *(("block_stock", count, None, None) for count in (2, 4)),  # with one it is end to end
        *(("block_fused", count, policy, None) for count in (1, 2, 4) for policy in POLICIES),
    }
    assert ways(methods="block_stock", num_blocks="1") == {("block_stock", 1, None, None)}


COMPILED = {"method": "compiled", "recompute": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "fused"}, "method must be of end_to_end, checkpointed, .*, got fused"),
        ({"recompute": None}, "recompute of block_fused must be of none, attention, .* got null"),
        ({"method": "selective"}, "recompute of selective must be of null, got none"),
        ({"budget": 0.5}, r"budget must be None for block_fused, got 0\.5"),
        ({**COMPILED, "budget": 1.5}, r"budget must be from 0 to 1, got 1\.5"),
        ({**COMPILED, "num_blocks": 2}, "num_blocks must be 1 for compiled, got 2"),
        ({"num_blocks": 13}, "num_blocks must be between 1 and the 12 layers, got 13"),
        ({"offload": "disk"}, "offload must be of none, cpu, got disk"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 3}, "accumulate must divide the batch size 128, got 3"),
        ({"prefetch": True}, "offload must be cpu or disk for prefetch, got none"),
        ({"data_parallel": 0}, "data_parallel must be at least 1, got 0"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"data_parallel": 3}, "batch_size must be a multiple of data_parallel 3, got 128"),
        (
            {"data_parallel": 2, "num_blocks": 2, "offload": "cpu"},
            "offload must be none with several devices or blocks alone, got cpu",
        ),
        (
            {"alone": True, "num_blocks": 2, "offload": "cpu"},
            "offload must be none with several devices or blocks alone, got cpu",
        ),
        (
            {"tensor_parallel": 2, "method": "end_to_end", "recompute": None},
            "tensor_parallel must be 1 for end_to_end, got 2",
        ),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(of_preset("vit", "digits"), **changes)
