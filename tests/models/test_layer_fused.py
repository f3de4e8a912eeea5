"""What running as one op asks of the layer's modules, and leaves to their users."""

from dataclasses import replace

import pytest
import torch
from models.tiny import randomise
from ops.one_layer import EVERY_POLICY, SAME_BITS, assert_same_bits, saved_bytes
from torch import nn

from dbkernels.models.layer import AdaLNLayer, LayerConfig
from dbkernels.models.rotary import rotary_table

B, T, D, H = 2, 5, 24, 3
CONFIG = LayerConfig(dim=D, num_heads=H, mlp_hidden=40, cond_dim=7, affine=True, qk_norm=True)
PROJECTIONS = ["attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2"]
HOOKS = [
    nn.Module.register_forward_pre_hook,
    nn.Module.register_forward_hook,
    nn.Module.register_full_backward_pre_hook,
    nn.Module.register_full_backward_hook,
]
NEVER_CALLED = (
    "reads the weights .* never calls them: each must be a plain {} without hooks, got {}"
)


def inputs():
    return torch.randn(B, T, D) + 2, torch.randn(B, 7), rotary_table(torch.arange(T), D // H)


def gradients(layer, *args):
    layer.zero_grad()
    layer(*args).square().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def test_each_policy_reaches_the_op_and_gives_the_same_gradients():
    weights, args = randomise(AdaLNLayer(CONFIG)).state_dict(), inputs()
    kept_bytes, results = [], []
    for recompute in EVERY_POLICY:
        layer = AdaLNLayer(replace(CONFIG, recompute=recompute))
        layer.load_state_dict(weights)
        kept_bytes.append(saved_bytes(lambda layer=layer: layer(*args)))
        results.append(gradients(layer, *args))
    assert kept_bytes == sorted(kept_bytes, reverse=True)
    # in float32 there is nothing to round
    assert len(set(kept_bytes)) == len(SAME_BITS) == len(EVERY_POLICY) - 1
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("register", HOOKS, ids=lambda register: register.__name__)
@pytest.mark.parametrize("name", [*PROJECTIONS, "attention", "mlp"])
def test_rejects_a_hook_that_would_not_run(name, register):
    layer, args = AdaLNLayer(CONFIG), inputs()
    module = layer.get_submodule(name)
    hook, kind = register(module, lambda *_: None), type(module).__name__
    with pytest.raises(RuntimeError, match=NEVER_CALLED.format(kind, kind)):
        layer(*args)
    hook.remove()
    layer(*args)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_rejects_a_projection_that_would_not_be_called(name):
    class Wrapped(nn.Linear):
        pass

    layer = AdaLNLayer(CONFIG)
    linear = layer.get_submodule(name)
    layer.set_submodule(name, Wrapped(linear.in_features, linear.out_features))
    with pytest.raises(RuntimeError, match=NEVER_CALLED.format("Linear", "Wrapped")):
        layer(*inputs())


def test_hooks_of_the_layer_of_its_condition_and_of_parameters_run():
    layer, seen, named = randomise(AdaLNLayer(CONFIG)), [], []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.modulation.register_forward_hook(lambda *_: seen.append("modulation"))
    layer.register_forward_hook(lambda module, args, y: seen.append("after") or 0 * y)
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_hook(lambda *_: seen.append("done"))
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: named.append(name))
    x, c, rotary = inputs()
    y = layer(x.requires_grad_(), c, rotary)
    assert not y.any()
    y.sum().backward()
    assert seen == ["before", "modulation", "after", "backward", "done"]
    assert sorted(named) == sorted(name for name, _ in layer.named_parameters())


def test_takes_the_weights_of_a_functional_call():
    layer, args = randomise(AdaLNLayer(CONFIG)), inputs()
    before = layer(*args)
    state = {n: p.detach().mul(0.5).requires_grad_() for n, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, state, args)
    y.square().sum().backward()
    assert torch.equal(layer(*args), before)
    assert all(p.grad is None for p in layer.parameters())
    layer.load_state_dict(state)
    expected = gradients(layer, *args)
    assert torch.equal(y, layer(*args))
    assert_same_bits({name: t.grad for name, t in state.items()}, expected)


def test_has_shapes_before_it_has_weights():
    with torch.device("meta"):
        layer = AdaLNLayer(CONFIG)
        y = layer(torch.empty(B, T, D), torch.empty(B, 7))
        assert y.shape == (B, T, D)
        y.sum().backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())
