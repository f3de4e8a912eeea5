"""A layer, and the last layer of a stack, of whose tokens only the first are asked for."""

from functools import partial

import pytest
import torch
from models.tiny import randomise
from torch import nn

from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.rotary import rotary_table

B, T, D, H = 3, 5, 12, 3
CONFIGS = [
    LayerConfig(D, H, 20, 7),
    LayerConfig(D, H, 20, 7, "rms", affine=True, mlp="swiglu", qk_norm=True, bias=False),
    LayerConfig(D, H, 20, 7, affine=True, recompute="qkv"),
]


def inputs(*, per_token=False):
    c = torch.randn((B, T, 7) if per_token else (B, 7), dtype=torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64) + 2
    return x, c, rotary_table(torch.arange(T), D // H)


def with_gradients(layers, args, run):
    """What layers make of the arguments, and the gradient in x, in c and in each parameter."""
    x, c, rotary = args
    x, c = (t.detach().requires_grad_() for t in (x, c))
    out = run(layers, x, c, rotary)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad(out, [x, c, *nn.ModuleList(layers).parameters()], dout)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_first_tokens_of_a_stack_are_the_first_of_all(config, depth, per_token):
    layers = [randomise(AdaLNLayer(config)).double() for _ in range(depth)]
    args = inputs(per_token=per_token)
    for num_queries in (1, T - 1, T):
        some = with_gradients(layers, args, partial(run_layers, num_queries=num_queries))
        whole = with_gradients(layers, args, lambda *a, n=num_queries: run_layers(*a)[:, :n])
        assert some[0].shape == (B, num_queries, D)
        for actual, expected in zip(some, whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_gives_the_first_tokens_alone(config):
    layer, args = randomise(AdaLNLayer(config)).double(), inputs()
    torch.testing.assert_close(
        layer(*args, num_queries=2), layer(*args)[:, :2], rtol=1e-10, atol=1e-10
    )
    assert torch.equal(layer(*args, num_queries=T), layer(*args))


def test_only_the_last_layer_leaves_tokens_out():
    layers, shapes = [AdaLNLayer(CONFIGS[0]).double() for _ in range(3)], []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    run_layers(layers, *inputs(), num_queries=2)
    assert shapes == [(B, T, D), (B, T, D), (B, 2, D)]


def test_no_layer_gives_the_first_tokens_of_x():
    x, c, rotary = inputs()
    assert run_layers([], x, c, rotary) is x
    assert torch.equal(run_layers([], x, c, rotary, num_queries=2), x[:, :2])


def test_rejects_more_tokens_than_there_are():
    layer = AdaLNLayer(CONFIGS[0]).double()
    message = r"num_queries must be an integer from 1 to T = 5, or None, got 6"
    for run in (layer, partial(run_layers, []), partial(run_layers, [layer, layer])):
        with pytest.raises(ValueError, match=message):
            run(*inputs(), num_queries=6)
