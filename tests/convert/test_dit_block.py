"""A DiT's block and the layer of it compute the same, or the part that differs is named."""

import copy
from dataclasses import fields, replace
from itertools import combinations
from random import Random

import pytest
import torch
from accuracy import with_grads
from convert import published
from convert.published import COND, HIDDEN, Block, D, H
from convert.variations import VARIATIONS, drops
from models.tiny import randomise
from torch import nn

from dbkernels.convert import dit_block_from_layer, layer_from_dit_block, layer_from_dit_state
from dbkernels.convert.read_block import DROPOUTS
from dbkernels.models.branches import BIASED
from dbkernels.models.layer import AdaLNLayer, LayerConfig
from dbkernels.ops import Draw

B, T = 2, 5
STATE = {"num_heads": H, "activation": "gelu_tanh", "qk_norm": "none", "eps": 1e-6}


FINE = [name for name, (_, named) in VARIATIONS.items() if named is None]


def made(*names, bias=True):
    block = Block(bias)
    for name in names:
        VARIATIONS[name][0](block)
    return randomise(block)


def assert_same_results(layer, block):
    """Of what is not left out; which share is left out stands in the layer's config."""
    layer, block = layer.double(), copy.deepcopy(block).double()
    shares = [getattr(block.get_submodule(name), "p", 0) for name in DROPOUTS]
    assert shares == [layer.config.attention_dropout, *2 * [layer.config.dropout]]
    for module in block.modules():
        if type(module) is nn.Dropout:
            module.eval()
    x, c = torch.randn(B, T, D).double() + 1, torch.randn(B, COND).double()
    for actual, expected in zip(with_grads(layer, x, c), with_grads(block, x, c), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FINE)
def test_a_converted_block_computes_the_same(name, bias):
    block = made(name, bias=bias)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert_same_results(layer_from_dit_block(block), block)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())


@pytest.mark.parametrize("name", [name for name in VARIATIONS if name not in FINE])
def test_what_no_layer_computes_is_refused_by_the_name_of_its_part(name):
    with pytest.raises(ValueError, match=rf"(^|\W){VARIATIONS[name][1]}($|\W)"):
        layer_from_dit_block(made(name))


def test_any_two_changes_compute_the_same_or_are_refused():
    """What is read of one part must not hide another."""
    converted = 0
    for names in combinations(VARIATIONS, 2):
        try:
            block = made(*names)
        except Exception:
            continue
        try:
            layer = layer_from_dit_block(block)
        except ValueError:
            continue
        assert_same_results(layer, block)
        converted += 1
    assert converted > len(FINE)


@pytest.mark.parametrize(
    "change",
    [
        drops("attn.attn_drop"),
        drops("attn.proj_drop", "mlp.drop2"),
        drops("attn.attn_drop", "attn.proj_drop", "mlp.drop2"),
    ],
)
def test_what_is_left_out_in_training_has_the_same_distribution(change):
    block = Block()
    change(block)
    layer = layer_from_dit_block(randomise(block)).double()
    block, count = block.double(), 2**14
    x, c = (torch.randn(1, *size).double().expand(count, *size) for size in ((T, D), (COND,)))
    with torch.no_grad():
        theirs, ours = block(x, c), layer(x, c, draw=Draw(1, 0))
    mean, spread = theirs.mean(0), theirs.std(0)
    assert spread.min() > 0.01 * mean.abs().mean()
    assert ((ours.mean(0) - mean).abs() < 6 * spread * (2 / count) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.1, atol=0)


# what a block of the published names holds of a layer, each with values that differ
HELD = {
    "norm": ("layer", "rms"),
    "affine": (False, True),
    "mlp": ("gelu", "gelu_exact", "swiglu"),
    "qk_norm": (False, True),
    "bias": (True, False, *(some for n in (1, 2, 3) for some in combinations(BIASED, n))),
    "eps": (1e-6, 1e-3),
    "eps2": (None, 1e-2),
    "qk_eps": (1e-6, 0.1),
    "head_dim": (None, 8),
    "dropout": (0.0, 0.4),
    "attention_dropout": (0.0, 0.3),
}


def layer_configs():
    """Each value alone, and then many together."""
    plain, random = LayerConfig(D, H, HIDDEN, COND), Random(0)
    alone = [{name: value} for name, values in HELD.items() for value in values]
    drawn = [{name: random.choice(values) for name, values in HELD.items()} for _ in range(150)]
    for options in (*alone, *drawn):
        config = replace(plain, **options)
        # no trace is left of an eps that nothing reads
        yield config if config.qk_norm else replace(config, qk_eps=plain.qk_eps)


def test_every_option_of_a_layer_is_held_or_refused():
    sizes = {"dim", "num_heads", "mlp_hidden", "cond_dim"}
    others = {"recompute", "silu_modulation"}  # how it runs, and what is refused
    assert {field.name for field in fields(LayerConfig)} == sizes | others | set(HELD)
    with pytest.raises(ValueError, match="silu_modulation must be False in a DiT block, got True"):
        dit_block_from_layer(AdaLNLayer(LayerConfig(D, H, HIDDEN, COND, silu_modulation=True)))


def test_a_layer_that_goes_to_a_block_and_back_has_the_same_config_and_bits():
    for config in layer_configs():
        layer = randomise(AdaLNLayer(config))
        block = published.block_of(config)
        block.load_state_dict(dit_block_from_layer(layer))
        back = layer_from_dit_block(block)
        assert back.config == config
        assert back.state_dict().keys() == layer.state_dict().keys()
        assert all(map(torch.equal, back.state_dict().values(), layer.state_dict().values()))
        assert_same_results(back, block)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FINE)
def test_a_block_that_goes_to_a_layer_and_back_has_the_same_bits(name, bias):
    block = made(name, bias=bias)
    state = dit_block_from_layer(layer_from_dit_block(block))
    assert state.keys() == block.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in block.state_dict().items())


def test_a_state_dict_gives_the_same_layer_where_the_caller_says_the_rest():
    activations = {"gelu": "gelu_tanh", "gelu_exact": "gelu_exact", "swiglu": "swiglu"}
    for config in layer_configs():
        if config.norm == "rms":
            continue
        layer = randomise(AdaLNLayer(replace(config, dropout=0.0, attention_dropout=0.0)))
        said = {"num_heads": H, "activation": activations[config.mlp], "qk_norm": "none"}
        said |= {"qk_norm": "rms"} if config.qk_norm else {}
        said |= {"eps": config.eps, "qk_eps": config.qk_eps}
        for eps2 in {config.eps2, config.eps2 or config.eps}:
            other = layer_from_dit_state(dit_block_from_layer(layer), **said, eps2=eps2)
            assert other.config == layer.config
            assert all(map(torch.equal, other.state_dict().values(), layer.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_layer_has_memory_and_dtype_of_its_own(dtype):
    block = randomise(Block()).to(dtype)
    for layer in (layer_from_dit_block(block), layer_from_dit_state(block.state_dict(), **STATE)):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        theirs = {p.data_ptr() for p in block.parameters()}
        assert not theirs & {p.data_ptr() for p in layer.parameters()}
        assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        (lambda state: state.clear(), {}, "a DiT block has attn.qkv.weight, got nothing"),
        (lambda state: state.pop("attn.proj.weight"), {}, "Missing key.*attention.out.weight"),
        (lambda state: state.update({"norm3.weight": torch.ones(D)}), {}, "has no norm3.weight"),
        (lambda state: state.update({"mlp.fc2.bias": torch.ones(3)}), {}, "mismatch for mlp.fc2"),
        (
            lambda state: state,
            {"activation": "gelu"},
            "activation must be one of gelu_tanh, gelu_e",
        ),
        (lambda state: state, {"qk_norm": "layer"}, "qk_norm must be one of none, rms, got layer"),
        (lambda state: state, {"qk_norm": "rms"}, "Missing key.*attention.q_norm.weight"),
        (lambda state: state, {"num_heads": 5}, "num_heads must be a number that divides a third"),
        (
            lambda state: state,
            {"num_heads": 0},
            "num_heads must be a number that divides .*, got 0",
        ),
        (
            lambda state: state.update({"attn.qkv.weight": torch.ones(0, D)}),
            {},
            "num_heads must be a number that divides a third of attn.qkv's 0 rows",
        ),
        (
            lambda state: state.update({"mlp.fc2.weight": torch.ones(D, HIDDEN, 1)}),
            {},
            r"mlp.fc2.weight must be \(rows, columns\), got \(12, 20, 1\)",
        ),
        (lambda state: state, {"activation": "swiglu"}, "mismatch for mlp.fc1.weight"),
        (lambda state: state.pop("mlp.fc2.weight"), {}, "a DiT block has mlp.fc2.weight, got"),
        (
            lambda state: state.update({"norm1.weight": torch.ones(D)}),
            {},
            "Missing key.*norm1.bias",
        ),
    ],
)
def test_other_weights_are_refused(change, said, message):
    state = Block().state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        layer_from_dit_state(state, **STATE | said)
