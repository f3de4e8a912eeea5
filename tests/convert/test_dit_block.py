from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import with_grads
from models.tiny import randomise
from torch import nn

from dbkernels.convert import dit_block_from_layer, layer_from_dit_block
from dbkernels.models.layer import AdaLNLayer, LayerConfig

B, T, D, H = 2, 5, 12, 3


class PublishedBlock(nn.Module):
    """The equations of the published DiT under its names."""

    def __init__(self, qk_norm=False, bias=True):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D, bias), "proj": nn.Linear(D, D, bias)})
        if qk_norm:
            self.attn.update({name: nn.RMSNorm(D // H, eps=1e-6) for name in ("q_norm", "k_norm")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 20, bias), "fc2": nn.Linear(20, D, bias)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(7, 6 * D))

    def attention(self, x):
        q, k, v = self.attn["qkv"](x).reshape(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        if "q_norm" in self.attn:
            q, k = self.attn["q_norm"](q), self.attn["k_norm"](k)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attn["proj"](x.transpose(1, 2).reshape(B, T, D))

    def feed_forward(self, x):
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](x), approximate="tanh"))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        for branch, (shift, scale, gate) in zip(
            (self.attention, self.feed_forward), (modulation[:3], modulation[3:]), strict=True
        ):
            x = x + gate * branch(F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift)
        return x


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"bias": False}], ids=str)
def test_a_converted_block_computes_the_same_and_back_has_the_same_bits(options):
    block = randomise(PublishedBlock(**options)).double()
    layer = layer_from_dit_block(block.state_dict(), num_heads=H)
    x, c = torch.randn(B, T, D).double() + 1, torch.randn(B, 7).double()
    for actual, expected in zip(with_grads(layer, x, c), with_grads(block, x, c), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    state = dit_block_from_layer(layer)
    assert state.keys() == block.state_dict().keys()
    for name, tensor in block.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_the_layer_has_memory_and_dtype_of_its_own():
    block = randomise(PublishedBlock()).bfloat16()
    layer = layer_from_dit_block(block.state_dict(), num_heads=H)
    block.mlp["fc1"].weight.data.zero_()
    assert layer.mlp.fc1.weight.dtype == torch.bfloat16 and layer.mlp.fc1.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.clear(), "a DiT block has attn.qkv.weight, got nothing"),
        (lambda state: state.pop("mlp.fc2.weight"), "Missing key.*mlp.fc2.weight"),
        (lambda state: state.update({"norm1.weight": torch.ones(D)}), "has no norm1.weight"),
        (lambda state: state.update({"mlp.fc2.bias": torch.ones(3)}), "size mismatch for mlp.fc2"),
    ],
)
def test_other_weights_are_refused(change, message):
    state = PublishedBlock().state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        layer_from_dit_block(state, num_heads=H)


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"affine": True}, {"mlp": "swiglu"}], ids=str)
def test_a_layer_that_dit_does_not_have_is_refused(options):
    config = replace(LayerConfig(D, H, 20, 7), **options)
    with pytest.raises(ValueError, match="a DiT block has norm layer, no affine and mlp gelu, got"):
        dit_block_from_layer(AdaLNLayer(config))
