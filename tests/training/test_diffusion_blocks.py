import operator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.tiny import PRIOR, families, make_blocks

from dbkernels.diffusion.flow import Flow
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.masked import Masked
from dbkernels.diffusion.prediction import EDM
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks, load_weights


def test_copies_share_layers_and_target_and_nothing_else():
    blocks = make_blocks(sharing="copies")
    first, *others = [blocks.of(block) for block in blocks]
    assert len(others) == 2
    for other in others:
        assert other.layers is first.layers
        assert other.label_table is first.label_table
        for name in ("patch", "condition", "norm", "modulation", "head"):
            assert getattr(other, name) is not getattr(first, name)
        assert other.positions is not first.positions
        assert torch.equal(other.patch.weight, first.patch.weight)


@families
@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_every_trainable_parameter_is_in_one_group_under_its_own_name(family, sharing):
    blocks = make_blocks(family, sharing=sharing)
    groups, joint = blocks.groups(), sharing == "joint"
    pairs = [(name, id(p)) for group in groups.values() for name, p in group.items()]
    named = dict(blocks.named_parameters())
    assert sorted(pairs) == sorted((name, id(p)) for name, p in named.items() if p.requires_grad)
    # copies freeze what makes the target
    frozen = {n for n, p in named.items() if not p.requires_grad}
    parts = () if joint else blocks.model.target_parts
    assert frozen == {n for n in named if n.split(".")[1] in parts}
    assert list(groups) == ["block0", "block1", "block2", *[SHARED] * joint]
    for index, block in enumerate(blocks):
        first = joint or index == 0
        assert (blocks.of(block) is blocks.model) == first
        prefix = "model." if first else f"copies.{index - 1}."
        rest = {n for n in named if n.startswith(prefix) and "layers." not in n} - frozen
        layers = {n for n in named if n.startswith(f"model.layers.{index}.")}
        assert set(groups[f"block{index}"]) == (layers if joint else layers | rest)
        assert not joint or groups[SHARED].keys() == rest


@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_one_block_shares_nothing_and_trains_everything(sharing):
    blocks = make_blocks(num_blocks=1, sharing=sharing)
    assert list(blocks.groups()) == ["block0"]
    assert len(blocks.groups()["block0"]) == len(list(blocks.parameters()))


def test_layers_run_in_the_order_that_was_asked_and_one_of_several_blocks_is_shared():
    blocks = make_blocks(num_blocks=2, layers=[0, 1, 1, 2], split=[2, 2])
    groups = blocks.groups()
    assert [block.layers for block in blocks] == [(0, 1), (1, 2)]
    assert any(name.startswith("model.layers.1.") for name in groups[SHARED])
    assert all(name.startswith("model.layers.0.") for name in groups["block0"])
    # as is a weight that layers of two blocks have in common
    first, *_, last = blocks.model.layers
    last.mlp.fc1.weight = first.mlp.fc1.weight
    assert "model.layers.0.mlp.fc1.weight" in blocks.groups()[SHARED]


two = partial(make_blocks, num_blocks=2)


def known(**settings):
    return DiffusionBlocks(Known(), **settings)


def load(name):
    load_weights(make_blocks(), {name: torch.zeros(4)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two(sharing="both"), "sharing must be one of joint, copies, got both"),
        (lambda: two(weighting="soft"), "weighting must be one of none, .*, got soft"),
        (lambda: two(layers=[0, 1, 2, 3]), r"layers must be 0 to 2, got \[0, 1, 2, 3\]"),
        (lambda: two(layers=[-1, 1, 2]), "layers must be 0 to 2"),
        (lambda: two(layers=[0, 1, 1, 2], sharing="copies"), "one block, got layer 1 in several"),
        (lambda: make_blocks(num_blocks=4), "num_blocks must be between 1 and the 3 layers, got 4"),
        (
            lambda: two("dit", process=Flow()),
            r"process must be on the path of the model, Exploding\(\), got Flow\(",
        ),
        (
            lambda: two("mdm", process=PRIOR),
            r"path of the model, that of tokens, got LogNormal\(",
        ),
        (lambda: two(process=Masked()), r"path of the model, Exploding\(\), got Masked\("),
        # a model of no known family needs both
        (lambda: known(weighting="none"), "process must be given for Known, .*, got None"),
        (lambda: known(process=PRIOR), "weighting must be one of none, .*, got None"),
        (
            lambda: load("model.head.bias"),
            r"weights model.head.bias must be \(3,\) .* got \(4,\)",
        ),
        (lambda: load("neck"), "weights neck must be none, got"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_family_brings_its_own_process_and_weighting_unless_another_is_given():
    other = LogNormal(mean=0.0)
    for family, weighting, least in (("vit", "none", 0.4), ("dit", "process", 0.002)):
        own = make_blocks(family, process=None)
        assert (own.process, own.weighting) == (LogNormal(sigma_min=least), weighting)
        blocks = make_blocks(family, process=other, weighting="published")
        assert (blocks.process, blocks.weighting) == (other, "published")
        assert blocks[0].noise == other.intervals(3)[0]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_frozen_parameters_are_those_of_layers_that_one_block_runs(sharing):
    blocks = make_blocks(sharing=sharing)
    assert blocks.frozen() == {"block0": [], "block1": [], "block2": []}
    for layer in blocks.model.layers:
        layer.mlp.requires_grad_(False)
    for index, (name, parameters) in enumerate(blocks.frozen().items()):
        expected = list(blocks.model.layers[index].mlp.parameters())
        assert name == f"block{index}" and len(parameters) == len(expected) > 0
        assert all(map(operator.is_, parameters, expected))
    # one that two blocks read travels with neither
    blocks.model.layers[0].mlp.fc1.weight = blocks.model.layers[1].mlp.fc1.weight
    sizes = [len(parameters) for parameters in blocks.frozen().values()]
    assert sizes == [len(expected) - 1, len(expected) - 1, len(expected)]


class Known(nn.Module):
    """A family whose losses are its levels."""

    target_parts, sigma_data, prediction = (), 0.5, EDM(0.5)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

    def level_shape(self, batch):
        return batch["levels"].shape

    def loss(self, draw, level, scale, layers, batch, interval):
        self.seen = SimpleNamespace(
            draw=draw, level=level, layers=layers, batch=batch, interval=interval
        )
        return (scale * level).sum()


def weighed(losses, weight, weighting, mean_weight):
    """The four weightings of (B,) losses, as equation 6 and the published code have them."""
    return {
        "none": losses.mean(),
        "process": (weight * losses).mean(),
        "normalised": (weight * losses).mean() / mean_weight,
        "published": weight.mean() * losses.mean(),
    }[weighting]


@pytest.mark.parametrize("shape", [(512,), (64, 9)])
@pytest.mark.parametrize("weighting", ["none", "process", "normalised", "published"])
def test_a_loss_weighs_the_losses_of_the_levels_that_it_drew(weighting, shape):
    blocks = known(process=PRIOR, weighting=weighting)
    block, batch, draw = blocks[1], {"levels": torch.zeros(shape)}, Draw(3, 4, 5)
    loss, seen, noise = blocks.loss(block, batch, draw), blocks.model.seen, block.trained_noise
    assert seen.draw is draw and seen.batch is batch and seen.layers == block.layers
    assert torch.equal(seen.level, PRIOR.level_at(noise, uniforms(draw, *shape)))
    assert seen.interval == noise
    assert noise.low <= seen.level.min() and seen.level.max() <= noise.high
    assert seen.level.min() < block.noise.low and seen.level.max() > block.noise.high
    mean = PRIOR.mean_weight(noise, EDM(0.5))
    weight = PRIOR.weight(seen.level, EDM(0.5)).double()
    expected = weighed(seen.level.double(), weight, weighting, mean)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
