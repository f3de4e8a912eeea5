import operator

import pytest
import torch
from training.tiny import PRIOR, VIT, make_models

from dbkernels.models import ViT
from dbkernels.training.partition import partition
from dbkernels.training.sharing import SHARED, BlockModels, load_weights


def test_joint_blocks_use_the_very_same_model():
    models = make_models(sharing="joint")
    assert all(models.of(block) is models.model for block in models.blocks)


def test_copies_share_layers_and_target_and_nothing_else():
    models = make_models(sharing="copies")
    first, *others = [models.of(block) for block in models.blocks]
    assert len(others) == 2
    for other in others:
        assert other.layers is first.layers
        assert other.label_table is first.label_table
        for name in ("patch", "condition", "norm", "modulation", "head"):
            assert getattr(other, name) is not getattr(first, name)
        assert other.positions is not first.positions
        assert torch.equal(other.patch.weight, first.patch.weight)


def test_copies_freeze_what_makes_the_target_and_joint_trains_it():
    assert not make_models(sharing="copies").model.label_table.weight.requires_grad
    assert make_models(sharing="joint").model.label_table.weight.requires_grad


@pytest.mark.parametrize("family", ["vit", "dit"])
@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_every_trainable_parameter_is_in_one_group_under_its_own_name(family, sharing):
    models = make_models(family, sharing=sharing)
    groups = models.groups()
    names = [name for parameters in groups.values() for name in parameters]
    expected = {name: p for name, p in models.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(expected)
    for parameters in groups.values():
        assert all(expected[name] is p for name, p in parameters.items())


def test_joint_blocks_own_their_layers_and_share_the_rest():
    groups = make_models(sharing="joint").groups()
    assert set(groups) == {"block0", "block1", "block2", SHARED}
    for index in range(3):
        assert all(name.startswith(f"model.layers.{index}.") for name in groups[f"block{index}"])
    assert not any("layers" in name for name in groups[SHARED])


def test_copies_leave_nothing_shared():
    groups = make_models(sharing="copies").groups()
    assert set(groups) == {"block0", "block1", "block2"}
    assert "model.patch.weight" in groups["block0"]
    assert "copies.0.patch.weight" in groups["block1"]
    assert "copies.1.patch.weight" in groups["block2"]
    assert "model.layers.1.norm1.weight" in groups["block1"]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_one_block_shares_nothing_and_trains_everything(sharing):
    models = make_models(num_blocks=1, sharing=sharing)
    assert list(models.groups()) == ["block0"]
    assert len(models.groups()["block0"]) == len(list(models.parameters()))


def test_a_layer_of_several_blocks_is_shared():
    models = BlockModels(ViT(VIT), partition([0, 1, 1, 2], 2, PRIOR), "joint")
    groups = models.groups()
    assert any(name.startswith("model.layers.1.") for name in groups[SHARED])
    assert all(name.startswith("model.layers.0.") for name in groups["block0"])


@pytest.mark.parametrize(
    ("layers", "sharing", "message"),
    [
        (3, "both", "sharing must be joint or copies, got both"),
        (4, "joint", "layers must be below 3, got 3"),
        ([0, 1, 1, 2], "copies", "must be in one block, got layer 1 in several"),
    ],
)
def test_rejects(layers, sharing, message):
    with pytest.raises(ValueError, match=message):
        BlockModels(ViT(VIT), partition(layers, 2, PRIOR), sharing)


def test_loading_rejects_weights_of_another_model():
    models = make_models()
    with pytest.raises(ValueError, match=r"weight model.head.bias must be \(3,\), got \(4,\)"):
        load_weights(models, {"model.head.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="weight neck must be no such parameter"):
        load_weights(models, {"neck": torch.zeros(4)})


@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_frozen_parameters_are_those_of_layers_that_one_block_runs(sharing):
    models = make_models(sharing=sharing)
    assert models.frozen() == {"block0": [], "block1": [], "block2": []}
    for layer in models.model.layers:
        layer.mlp.requires_grad_(False)
    for index, (name, parameters) in enumerate(models.frozen().items()):
        expected = list(models.model.layers[index].mlp.parameters())
        assert name == f"block{index}" and len(parameters) == len(expected) > 0
        assert all(map(operator.is_, parameters, expected))
    # one that two blocks read travels with neither
    models.model.layers[0].mlp.fc1.weight = models.model.layers[1].mlp.fc1.weight
    sizes = [len(parameters) for parameters in models.frozen().values()]
    assert sizes == [len(expected) - 1, len(expected) - 1, len(expected)]
