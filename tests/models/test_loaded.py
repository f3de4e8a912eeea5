"""A model that was made without memory and then loaded computes what the original does."""

import copy
from dataclasses import replace

import pytest
import torch
from models.tiny import DRAW, SCALE, levels_of, make_batch, noisy, randomise

from dbkernels.models import FAMILIES
from dbkernels.models.embed import FinalModulation, NoiseEmbedding
from dbkernels.models.layer import AdaLNLayer, LayerConfig
from dbkernels.training.diffusion_blocks import DiffusionBlocks, load_weights

PRESETS = [(family, name) for family, entry in FAMILIES.items() for name in entry.model.presets]
each_preset = pytest.mark.parametrize(("family", "preset"), PRESETS)


def shrunk(family, preset):
    """The preset with the same settings, small in all that has a size."""
    config = FAMILIES[family].model.preset(preset)
    config = config.resized({"dim": 4 * config.num_heads, "depth": 2})
    if "token" in config.fields():
        return replace(config, length=5, vocabulary=4)
    sizes = {"num_classes": 4} if "label" in config.fields() else {"text_length": 3, "text_dim": 5}
    return replace(config, image_size=2 * config.patch, **sizes)


def results(model, batch):
    """What a family computes, by name: a prediction, a loss and the gradients of parameters."""
    z, (level, interval), layers = noisy(model, batch), levels_of(model), range(len(model.layers))
    loss = model.loss(DRAW, level, SCALE, layers, batch, interval)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    found = {"prediction": model.denoise(z, level, layers, batch), "loss": loss}
    return found | dict(zip(dict(model.named_parameters()), gradients, strict=True))


def copied(module, state):
    module.to_empty(device="cpu").load_state_dict(state)


def assigned(module, state):
    module.load_state_dict(state, assign=True)


def parameters_alone(module, state):
    """As a checkpoint of a run holds them."""
    load_weights(module.to_empty(device="cpu"), {n: state[n] for n, _ in module.named_parameters()})


def in_bfloat16_and_back(module, state):
    """A cast of the module rounds its parameters, which are then as they were, and nothing else."""
    copied(module, state)
    module.bfloat16().float().load_state_dict(state)


WAYS = [copied, assigned, parameters_alone, in_bfloat16_and_back]
each_way = pytest.mark.parametrize("load", WAYS)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@each_preset
@each_way
def test_a_model_made_on_meta_and_loaded_equals_the_original(family, preset, load):
    config = shrunk(family, preset)
    original = randomise(FAMILIES[family].model(config))
    with torch.device("meta"):
        other = FAMILIES[family].model(config)
    load(other, {name: tensor.clone() for name, tensor in original.state_dict().items()})
    batch = make_batch(original)
    assert_same(results(other, batch), results(original, batch))


@each_preset
def test_blocks_with_copies_made_on_meta_and_loaded_equal_the_original(family, preset):
    def blocks():
        model = FAMILIES[family].model(config)
        return DiffusionBlocks(model, 2, weighting="none", sharing="copies")

    config = shrunk(family, preset)
    original = randomise(blocks())
    batch = make_batch(original.model)
    with torch.device("meta"):
        other = blocks()
    other.to_empty(device="cpu")
    load_weights(other, dict(original.named_parameters()))
    for block, same in zip(original, other, strict=True):
        assert torch.equal(original.loss(block, batch, DRAW), other.loss(same, batch, DRAW))


@pytest.mark.parametrize(
    "module",
    [
        *(FAMILIES[family].model(shrunk(family, preset)) for family, preset in PRESETS),
        AdaLNLayer(LayerConfig(8, 2, 8, 8, "rms", affine=True, mlp="swiglu", qk_norm=True)),
        NoiseEmbedding(8),
        FinalModulation(8, 8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_tensor_of_a_module_is_in_its_state_dict(module):
    module = copy.deepcopy(module)
    tensors = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    assert tensors == set(module.state_dict())
    for name, inner in module.named_modules():
        # a tensor that is a plain attribute is neither moved nor cast nor saved
        lost = [key for key, value in vars(inner).items() if isinstance(value, torch.Tensor)]
        assert not lost, f"{name}: {lost}"
