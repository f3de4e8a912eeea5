"""What each option of a layer changes, its draws, and a condition of each token."""

from dataclasses import fields, replace

import pytest
import torch
from models.tiny import randomise
from ops.one_layer import EVERY_POLICY, saved_bytes

from dbkernels.convert import dit_block_from_layer
from dbkernels.models.baseline import stock_layer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.ops import POLICIES, Draw
from dbkernels.ops.layer import passes

B, T, D, H = 3, 5, 12, 3
CONFIG = LayerConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=7)
FUSED = replace(CONFIG, affine=True, qk_norm=True)
# of each field a value that is not the default; None is one that says no more than how it is run
CHANGES = {
    "dim": 24, "num_heads": 2, "mlp_hidden": 8, "cond_dim": 5, "norm": "rms", "affine": True,
    "mlp": "gelu_exact", "qk_norm": True, "bias": ("qkv",), "eps": 0.5, "eps2": 0.5, "qk_eps": 0.5,
    "head_dim": 6, "silu_modulation": True, "dropout": 0.4, "attention_dropout": 0.4,
    "recompute": None,
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(LayerConfig) if CHANGES[f.name]])
def test_every_option_reaches_the_op_and_its_specification(name):
    def layer_of(config):
        torch.manual_seed(2)
        return randomise(AdaLNLayer(config)).double()

    before = replace(CONFIG, qk_norm=name == "qk_eps")
    config = replace(before, **{name: CHANGES[name]})
    x, c = torch.randn(B, T, config.dim).double() + 2, torch.randn(B, config.cond_dim).double()
    layer, draw = layer_of(config), Draw(1, 2)
    y = layer(x, c, draw=draw)
    torch.testing.assert_close(stock_layer(layer, x, c, None, draw), y, rtol=1e-10, atol=1e-10)
    if name not in ("dim", "cond_dim"):
        assert not torch.allclose(layer_of(before)(x, c, draw=draw), y)


def test_no_dit_block_has_silu_after_its_projection():
    with pytest.raises(ValueError, match="silu_modulation must be False in a DiT block, got True"):
        dit_block_from_layer(AdaLNLayer(replace(CONFIG, silu_modulation=True)))


def test_each_place_in_a_stack_has_a_draw_of_its_own():
    layer, draw = randomise(AdaLNLayer(replace(CONFIG, dropout=0.4))), Draw(1, 2)
    x, c = torch.randn(B, T, D), torch.randn(B, 7)
    once = layer(x, c, draw=draw.nth(0))
    assert torch.equal(run_layers([layer] * 2, x, c, draw=draw), layer(once, c, draw=draw.nth(1)))
    assert not torch.equal(layer(x, c, draw=draw.nth(1)), once)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("config", [FUSED, replace(FUSED, norm="rms", silu_modulation=True)])
def test_a_condition_of_each_token_is_all_that_low_policies_keep_of_it(config, recompute):
    layers = [randomise(AdaLNLayer(replace(config, recompute=recompute))) for _ in range(2)]
    x, c = torch.randn(B, T, D) + 2, torch.randn(B, T, 7)
    x, c = x.requires_grad_(), c.requires_grad_()
    parameters = [p for layer in layers for p in layer.parameters()]
    kept = saved_bytes(lambda: run_layers(layers, x, c), but=[x, c, *parameters])
    of_sample = saved_bytes(
        lambda: run_layers(layers, x, c[:, 0].contiguous()), but=[x, c, *parameters]
    )
    if POLICIES[recompute].keeps_modulation:
        assert kept > of_sample + 2 * 6 * x.nbytes - 2 * B * 6 * D * 4
    else:
        # the second layer keeps its own x, which runs of a stack spare the others
        of_layer = {"layer": 0, "layer_narrow": 0, "qkv": 3}[recompute]
        small = 2 * B * T * (4 + H) * 4  # statistics
        assert kept <= (1 + 2 * of_layer) * x.nbytes + small


@pytest.mark.parametrize("frozen", [(), ("modulation.weight",), ("modulation.bias", "norm1.bias")])
@pytest.mark.parametrize("part", [5, 10])
def test_a_modulation_that_is_computed_again_gives_the_same_gradients(part, frozen, monkeypatch):
    monkeypatch.setattr(passes, "PART", part)
    results = []
    for recompute in ("none", "qkv", "layer"):
        torch.manual_seed(3)
        layer = randomise(AdaLNLayer(replace(FUSED, recompute=recompute))).double()
        seen = []
        layer.modulation.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)
        x, c = torch.randn(B, T, D).double() + 2, torch.randn(B, T, 7).double()
        leaves = {"c": c.requires_grad_(), **dict(layer.named_parameters())}
        leaves = {name: t for name, t in leaves.items() if t.requires_grad}
        out = layer(x, c)
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        results.append({"out": out, **dict(zip(leaves, grads, strict=True))})
        assert len(seen) > 1 or recompute == "none"
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)


def test_a_modulation_is_computed_again_in_the_autocast_that_it_was_made_in():
    grads = []
    for recompute in ("none", "layer"):
        torch.manual_seed(3)
        layer = randomise(AdaLNLayer(replace(FUSED, recompute=recompute)))
        x, c = torch.randn(B, T, D) + 2, torch.randn(B, T, 7)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, c)
        grads.append(torch.autograd.grad(out.square().sum(), list(layer.parameters())))
    assert all(map(torch.equal, *grads))
