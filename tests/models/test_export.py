"""Exported programs: of torch's own ops alone, differentiable, and equal in value."""

import io
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models.tiny import every_family, levels_of, make_batch, make_model, noisy, randomise
from torch import nn
from torch.export import Dim, export

from dbkernels.models.baseline import stock_layer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.rotary import rotary_table

D = 12
CONFIG = LayerConfig(D, 3, 20, 7)
each_way = pytest.mark.parametrize("strict", [False, True])
trained = pytest.mark.parametrize("trainable", [False, True])


def inputs(B=3, T=5):
    return torch.randn(B, T, D) + 2, torch.randn(B, 7)


def assert_only_torch(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if hasattr(target, "namespace")} == {"aten"}
    assert all(isinstance(t, torch._ops.OpOverload) or t.__module__ == "_operator" for t in targets)


def with_gradients(module, run, *args):
    """What run gives, and the gradients of the module's parameters where they have one, by name."""
    found = {"out": run(*args)}
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if named:
        grads = torch.autograd.grad(found["out"].square().sum(), list(named.values()))
        found |= zip(named, grads, strict=True)
    return found


@pytest.mark.parametrize(
    "config",
    [CONFIG, LayerConfig(D, 3, 20, 7, "rms", affine=True, mlp="swiglu", qk_norm=True, bias=False)],
)
@each_way
@trained
def test_a_layer_is_exported_and_its_program_computes_and_learns_as_it(config, strict, trainable):
    layer, args = randomise(AdaLNLayer(config)), (*inputs(), rotary_table(torch.arange(5), 4))
    layer.requires_grad_(trainable)
    program = export(layer, args, strict=strict)
    assert_only_torch(program)
    module = program.module()
    actual, expected = with_gradients(module, module, *args), with_gradients(layer, layer, *args)
    layer.run = stock_layer
    eager = with_gradients(layer, layer, *args)
    exact_args = [t.double() for t in args[:2]] + [args[2]]
    exact = with_gradients(layer.double(), layer, *exact_args)
    assert actual.keys() == expected.keys() and len(actual) == 1 + trainable * len(
        layer.state_dict()
    )
    for name in exact:
        assert_as_accurate_as_eager(name, actual[name], eager[name], exact[name], factor=3)
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


class Stack(nn.Module):
    def __init__(self, depth, **told):
        super().__init__()
        self.layers = nn.ModuleList(randomise(AdaLNLayer(CONFIG)) for _ in range(depth))
        self.told = told

    def forward(self, x, c):
        return run_layers(self.layers, x, c, **self.told)


@each_way
@pytest.mark.parametrize(
    "told", [{"attention": "causal"}, {"attention": "two_stream", "num_samples": 2}], ids=str
)
def test_a_stack_is_exported_with_its_attention(strict, told):
    stack, args = Stack(2, **told), inputs(4)
    program = export(stack, args, strict=strict)
    assert_only_torch(program)
    torch.testing.assert_close(program.module()(*args), stack(*args), rtol=1e-4, atol=1e-5)


@each_way
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7), (1, 7), (3, 1, 7)])
def test_a_stack_is_exported_with_its_first_tokens_and_every_condition(strict, shape):
    stack, x, c = Stack(3, num_queries=2), inputs()[0], torch.randn(shape)
    module = export(stack, (x, c), strict=strict).module()
    torch.testing.assert_close(module(x, c), stack(x, c), rtol=1e-5, atol=1e-5)


class Denoise(nn.Module):
    """A family's network as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z, level, batch):
        return self.model.denoise(z, level, (0, 2), batch)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@every_family
@each_way
def test_a_whole_network_is_exported_saved_and_loaded_for_any_batch(family, strict):
    model = make_model(family)
    batch, network = make_batch(model), Denoise(model)
    level, _ = levels_of(model)
    args, B = (noisy(model, batch).detach(), level, batch), Dim("B")
    shapes = {0: B}, {0: B}, {name: {0: B} for name in batch}
    program = export(network, args, dynamic_shapes=shapes, strict=strict)
    assert_only_torch(program)
    module = saved_and_loaded(program).module()
    for count in (3, 2):
        z, at, some = args[0][:count], level[:count], {k: v[:count] for k, v in batch.items()}
        out = module(z, at, some)
        torch.testing.assert_close(out, network(z, at, some), rtol=1e-4, atol=1e-5)
        assert out.requires_grad


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_exporting_leaves_the_layer_as_it_was(recompute):
    layer = randomise(AdaLNLayer(replace(CONFIG, recompute=recompute)))
    args = inputs()
    before = layer(*args)
    export(layer, args)
    assert torch.equal(layer(*args), before)
