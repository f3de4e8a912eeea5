"""Modules inside a layer are read and never called: each change to one of them is refused."""

import copy
import pickle
import re
from dataclasses import replace
from types import MethodType

import pytest
import torch
from models.tiny import randomise
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dbkernels.models.as_made import as_made
from dbkernels.models.layer import AdaLNLayer, LayerConfig, make_norm

D = 12
CONFIG = LayerConfig(dim=D, num_heads=3, mlp_hidden=20, cond_dim=7)
FUSED = replace(CONFIG, affine=True, qk_norm=True)
ARGS = torch.linspace(1, 3, 180).view(3, 5, D), torch.linspace(-1, 1, 21).view(3, 7)
INSIDE = [name for name, _ in AdaLNLayer(FUSED).named_modules() if name not in ("", "modulation")]
HOOKS = [
    name
    for name in dir(nn.Module)
    if re.fullmatch("register_.*_hook", name) and "state_dict" not in name
]


def replace_module(layer, name, made):
    layer.set_submodule(name, made(layer.get_submodule(name)))


def changes(layer, name):
    """Ways to change a module inside, by name; some only where it has a weight."""
    module = layer.get_submodule(name)
    kind, own_forward = type(module), {"forward": lambda *_: torch.zeros(1)}

    def adapter(x):
        return kind.forward(module, x) + x

    yield "forward", lambda: setattr(module, "forward", adapter)
    yield "bound forward", lambda: setattr(module, "forward", MethodType(adapter, module))
    yield "class", lambda: setattr(module, "__class__", type("Other", (kind,), own_forward))
    yield "same class", lambda: setattr(module, "__class__", type(kind.__name__, (kind,), {}))
    yield "wrapper", lambda: replace_module(layer, name, nn.Sequential)
    yield "nothing", lambda: replace_module(layer, name, lambda _: nn.Identity())
    yield (
        "removed",
        lambda: layer.get_submodule(name.rpartition(".")[0])._modules.pop(name.rpartition(".")[2]),
    )
    yield "child", lambda: module.add_module("lora", nn.Linear(2, 2))
    yield "parameter", lambda: module.register_parameter("lora", nn.Parameter(torch.ones(2)))
    for hook in HOOKS:
        yield hook, lambda hook=hook: getattr(module, hook)(lambda *_: None)
    yield (
        "with kwargs",
        lambda: module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True),
    )
    yield "pre with kwargs", lambda: module.register_forward_pre_hook(print, with_kwargs=True)
    settings = {"eps": 1e-3, "normalized_shape": (6, 2)}
    settings["elementwise_affine"] = not getattr(module, "elementwise_affine", True)
    for key, value in settings.items():
        if hasattr(module, key):
            yield key, lambda key=key, value=value: setattr(module, key, value)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        yield "no weight", lambda: setattr(module, "weight", None)
        yield "pruned", lambda: prune.random_unstructured(module, "weight", amount=0.5)
        yield (
            "parametrised",
            lambda: parametrize.register_parametrization(module, "weight", nn.Identity()),
        )
    if kind is nn.Linear:
        yield "weight norm", lambda: parametrizations.weight_norm(module)
        yield "spectral norm", lambda: parametrizations.spectral_norm(module)
    elif "weight" in module._parameters and module.weight is None:
        yield "weight", lambda: setattr(module, "weight", nn.Parameter(torch.ones(D)))


def test_the_kinds_of_hooks_are_those_of_torch():
    assert len(HOOKS) == 5 and set(HOOKS) >= {"register_forward_hook", "register_backward_hook"}


@pytest.mark.parametrize("config", [FUSED, replace(CONFIG, norm="rms")])
@pytest.mark.parametrize("name", INSIDE)
def test_rejects_every_change_to_a_module_that_would_not_be_called(config, name):
    if name not in dict(AdaLNLayer(config).named_modules()):
        return
    for way in [way for way, _ in changes(AdaLNLayer(config), name)]:
        layer = AdaLNLayer(config)
        dict(changes(layer, name))[way]()
        message = rf"never calls them: {name} must be a plain \w+ as it was made, got .*\. Hook or"
        with pytest.raises(RuntimeError, match=message):
            layer(*ARGS)
            pytest.fail(f"{way} of {name} is not noticed")


def test_a_hook_that_was_removed_is_forgotten():
    layer = AdaLNLayer(FUSED)
    for name in INSIDE:
        layer.get_submodule(name).register_forward_hook(lambda *_: None).remove()
    layer(*ARGS)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.eval().requires_grad_(False),
        lambda layer: (layer.load_state_dict(layer.state_dict(), assign=True), layer)[1],
        lambda layer: (layer.add_module("adapter", nn.Linear(2, 2)), layer)[1],
        lambda layer: (layer.set_submodule("norm1", make_norm(layer.config)), layer)[1],
        lambda layer: (setattr(layer.mlp, "note", "seen"), layer)[1],
    ],
)
def test_what_changes_no_number_is_allowed(change):
    layer = randomise(AdaLNLayer(CONFIG))
    expected = layer(*ARGS)
    assert torch.equal(change(layer)(*ARGS), expected)


def test_a_module_inside_of_which_nothing_is_known_cannot_be_made():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Dropout(0.1))

    with pytest.raises(AssertionError, match=r"inside\.0: nothing is known of how to read"):
        as_made(Other(), ("inside",), {nn.Sequential: ()})
