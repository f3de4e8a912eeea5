"""Layers that read a text beside the image: positions of both, and the masks that are taken."""

import sys

import pytest
import torch
from convert.fused_cases import B, D, H, T, basic, cross, flux_single, real, rows
from convert.test_fused_layers import fused
from torch import nn

from dbkernels.convert import fuse
from dbkernels.convert.fused.cross_transformer_block import lengths_of

FLUX = "diffusers.models.transformers.transformer_flux"


def turned(x, angles, sequence_dim):
    """diffusers' rotation of neighbours, which rounds nothing to float32."""
    assert sequence_dim == 1
    cos, sin = (t[:, None] for t in angles)
    other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + other * sin


def with_grads(module, given, rotary):
    leaves = [t.detach().clone().requires_grad_() for t in given]
    outputs = module(*leaves, rotary)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
    wanted = [*leaves, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, weights)]


@pytest.mark.parametrize("recompute", ["none", "qkv", "layer"])
def test_flux_turns_text_and_image_by_their_positions(recompute, monkeypatch):
    module, given = flux_single()
    monkeypatch.setattr(sys.modules[FLUX], "apply_rotary_emb", turned)
    module, given = module.double(), [t.double() for t in given]
    embed = real(FLUX).FluxPosEmbed(100, [2, D // H - 2])
    rotary = embed(torch.randint(0, 50, (2 + T, 2)).float())
    layer = fused(module, recompute)
    for _ in range(2):  # the second time by the table that the first made
        expected, actual = (with_grads(each, given, rotary) for each in (module, layer))
        for value, exact in zip(actual, expected, strict=True):
            assert (value - exact).abs().max() <= 1e-12 * exact.abs().max()
    rotary[0].mul_(0.5)
    assert torch.allclose(layer(*given, rotary)[0], module(*given, rotary)[0], rtol=1e-10)
    with pytest.raises(ValueError, match=r"joint_attention_kwargs must be None .*, got scale"):
        layer(*given, rotary, {"scale": 2.0})


@pytest.mark.parametrize("closed", [-10000.0, -torch.inf])
def test_a_mask_of_lengths_is_taken_as_it_is_added_to_the_scores(closed):
    module, given = cross()
    x, _, context, seen, timestep = (t.double() if t is not None else t for t in given)
    mask = torch.zeros(B, 1, 4, dtype=torch.float64).masked_fill(seen == 0, closed)
    told = {"encoder_hidden_states": context, "timestep": timestep}
    layer, module = fused(module.double()), module.double()
    for _ in range(2):
        expected = module(x, encoder_attention_mask=mask, **told)
        actual = layer(x, encoder_attention_mask=mask, **told)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        mask[0, 0, 1] = 0  # a mask that has changed is read again
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        layer(x, timestep=timestep)
    with pytest.raises(ValueError, match="attention_mask must be None for a fused layer"):
        layer(x, mask, **told)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), r"\(B, 1, S\) = \(2, 1, 3\) .*, got \(2, 3\) of torch.float32"),
        (torch.zeros(2, 1, 3).int(), "got .* of torch.int32"),
        (torch.tensor([[[0.0, -1e4, 0.0]]] * 2), "its first tokens, at least one"),
        (torch.tensor([[[0.0, 0.0, -5.0]]] * 2), "close the others by -10000.0 or less"),
        (torch.full((2, 1, 3), -1e4), "at least one"),
        (torch.tensor([[[False, True, True]]] * 2), "its first tokens"),
    ],
    ids=range(6),
)
def test_rejects_any_other_mask(mask, message):
    with pytest.raises(ValueError, match=f"encoder_attention_mask must .*{message}"):
        lengths_of(mask, rows(2, 3, 5))


def test_cross_attention_of_another_norm_is_left():
    module = basic("ada_norm_zero", cross_attention_dim=10).module
    report = fuse(nn.ModuleList([module]))
    assert not report.replaced and "norm_type must be ada_norm_single" in report.left[0].why
