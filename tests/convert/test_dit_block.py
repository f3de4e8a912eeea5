"""A DiT's block and the layer of it compute the same, or the part that differs is named."""

import copy
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from accuracy import with_grads
from convert import published
from convert.published import COND, HIDDEN, Block, D, H
from models.tiny import randomise
from torch import nn
from torch.nn.utils import parametrizations

from dbkernels.convert import dit_block_from_layer, layer_from_dit_block, layer_from_dit_state
from dbkernels.models.layer import AdaLNLayer, LayerConfig

B, T = 2, 5
STATE = {"num_heads": H, "activation": "gelu_tanh", "qk_norm": "none", "eps": 1e-6}


def put(name, make):
    """Changes a block's part."""
    return lambda block: block.set_submodule(name, make(), strict=True)


def both(first, second, make):
    def change(block):
        for name in (first, second):
            block.set_submodule(name, make(), strict=True)

    return change


def of_class(kind):
    return lambda block: setattr(block, "__class__", kind)


def attention(kind):
    return lambda block: setattr(block, "attn", kind())


def set_in(name, **values):
    def change(block):
        module = block.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)

    return change


def functional(kind):
    def change(block):
        del block.norm1, block.norm2, block.mlp.act
        block.__class__ = kind

    return change


rms = partial(nn.RMSNorm, D // H)
norms = partial(both, "norm1", "norm2")
qk = partial(both, "attn.q_norm", "attn.k_norm")
same_scale = (D // 2) ** -0.5
# by what it changes: the change, and the part that is named where no layer has it
VARIATIONS = {
    "as published": (lambda block: None, None),
    "rms of q and k": (qk(partial(rms, eps=1e-6)), None),
    "other heads": (set_in("attn", num_heads=2, scale=same_scale), None),
    "other eps": (norms(partial(nn.LayerNorm, D, 1e-3, False)), None),
    "affine norms": (norms(partial(nn.LayerNorm, D, 1e-6)), None),
    "rms norms": (norms(partial(nn.RMSNorm, D, 1e-5, False)), None),
    "affine rms norms": (norms(partial(nn.RMSNorm, D, 1e-5)), None),
    "gated": (put("mlp", published.Gated), None),
    "functions": (functional(published.Functional), None),
    "idle drop path": (lambda block: block.add_module("drop_path1", nn.Identity()), None),
    "exact gelu": (put("mlp.act", nn.GELU), "mlp.act"),
    "silu": (put("mlp.act", nn.SiLU), "mlp.act"),
    "relu": (put("mlp.act", nn.ReLU), "mlp.act"),
    "exact function": (functional(published.Exact), "Exact"),
    "other eps in a function": (functional(published.OtherEps), "OtherEps"),
    "gate last": (put("mlp", partial(published.Gated, gate_last=True)), "Block"),
    "layer norm of q and k": (qk(partial(nn.LayerNorm, D // H, 1e-6)), "attn.q_norm"),
    "rms of q and k, other eps": (qk(partial(rms, eps=1e-5)), "attn.q_norm.eps"),
    "rms of q and k, no eps": (qk(rms), "attn.q_norm.eps"),
    "rms without weights": (qk(partial(rms, 1e-6, False)), "attn.q_norm.elementwise_affine"),
    "own rms norm": (qk(published.OwnRMSNorm), "attn.q_norm"),
    "rms of q alone": (put("attn.q_norm", partial(rms, eps=1e-6)), "attn.q_norm"),
    "rms of k, other eps": (
        lambda block: (qk(partial(rms, eps=1e-6))(block), set_in("attn.k_norm", eps=1.0)(block)),
        "attn.k_norm.eps",
    ),
    "norm after attention": (put("attn.norm", partial(nn.LayerNorm, D)), "attn.norm"),
    "heads that do not divide": (set_in("attn", num_heads=5), "attn.num_heads"),
    "no heads": (lambda block: delattr(block.attn, "num_heads"), "attn.num_heads"),
    "lies about heads": (attention(published.TwoHeads), "Block"),
    "other scale": (set_in("attn", scale=1 / (D // H)), "attn.scale"),
    "rotated": (attention(published.Rotated), "Block"),
    "causal": (attention(published.Causal), "Block"),
    "eps of one norm": (put("norm2", partial(nn.LayerNorm, D, 1e-5, False)), "norm2"),
    "affine norm2": (put("norm2", partial(nn.LayerNorm, D, 1e-6)), "norm2"),
    "weight without bias": (norms(partial(nn.LayerNorm, D, 1e-6, True, False)), "norm1"),
    "rms without eps": (norms(partial(nn.RMSNorm, D, None, False)), "norm1.eps"),
    "group norm": (norms(partial(nn.GroupNorm, 1, D)), "norm1"),
    "no bias of qkv": (set_in("attn.qkv", bias=None), "attn.proj and mlp.fc1"),
    "no bias of the modulation": (set_in("adaLN_modulation.1", bias=None), "adaLN_modulation.1"),
    "gelu of c": (put("adaLN_modulation.0", nn.GELU), "adaLN_modulation.0"),
    "more of c": (
        lambda block: block.adaLN_modulation.append(nn.Tanh()),
        "adaLN_modulation.2",
    ),
    "attention dropout": (set_in("attn.attn_drop", p=0.1), "attn.attn_drop"),
    "dropout of the mlp": (set_in("mlp.drop2", p=0.1), "mlp.drop2"),
    "layer scale": (lambda block: block.add_module("ls1", published.LayerScale()), "ls1"),
    "bias of positions": (
        lambda block: block.attn.register_parameter("table", nn.Parameter(torch.ones(3))),
        "attn.table",
    ),
    "lora": (put("attn.qkv", published.LoRALinear), "attn.qkv"),
    "weight norm": (lambda block: parametrizations.weight_norm(block.mlp.fc1), "mlp.fc1"),
    "hook": (
        lambda block: block.mlp.fc1.register_forward_hook(lambda *args: args[2] + 1),
        "Block",
    ),
    "parallel": (of_class(published.Parallel), "Parallel"),
    "scale first": (of_class(published.ScaleFirst), "ScaleFirst"),
    "two results": (of_class(published.Tuple), r"block\(x, c\)"),
    "no attention": (lambda block: delattr(block, "attn"), "attn.qkv"),
    "no activation of c": (
        lambda block: setattr(block, "adaLN_modulation", nn.Linear(COND, 6 * D)),
        "adaLN_modulation",
    ),
    "other dtypes": (lambda block: block.mlp.double(), "mlp.fc1.weight"),
}  # fmt: skip
FINE = [name for name, (_, named) in VARIATIONS.items() if named is None]


def made(*names, bias=True):
    block = Block(bias)
    for name in names:
        VARIATIONS[name][0](block)
    return randomise(block)


def assert_same_results(layer, block):
    layer, block = layer.double(), copy.deepcopy(block).double()
    x, c = torch.randn(B, T, D).double() + 1, torch.randn(B, COND).double()
    for actual, expected in zip(with_grads(layer, x, c), with_grads(block, x, c), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FINE)
def test_a_converted_block_computes_the_same(name, bias):
    block = made(name, bias=bias if name != "gated" else True)
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


@pytest.mark.parametrize("names", [("as published",), ("rms of q and k",), ("other heads",)])
@pytest.mark.parametrize("bias", [True, False])
def test_back_it_has_the_same_bits(names, bias):
    block = made(*names, bias=bias)
    state = dit_block_from_layer(layer_from_dit_block(block))
    assert state.keys() == block.state_dict().keys()
    for name, tensor in block.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_state_dict_gives_the_same_layer_where_the_caller_says_the_rest():
    saying = {"other heads": {"num_heads": 2}, "rms of q and k": {"qk_norm": "rms"}}
    for name, said in {**saying, "other eps": {"eps": 1e-3}}.items():
        block = made(name)
        layer, other = (
            layer_from_dit_block(block),
            layer_from_dit_state(block.state_dict(), **STATE | said),
        )
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
        (lambda state: state.pop("mlp.fc2.weight"), {}, "Missing key.*mlp.fc2.weight"),
        (lambda state: state.update({"norm3.weight": torch.ones(D)}), {}, "has no norm3.weight"),
        (lambda state: state.update({"mlp.fc2.bias": torch.ones(3)}), {}, "mismatch for mlp.fc2"),
        (lambda state: state, {"activation": "gelu"}, "activation must be one of gelu_tanh, got"),
        (lambda state: state, {"qk_norm": "layer"}, "qk_norm must be one of none, rms, got layer"),
        (lambda state: state, {"qk_norm": "rms"}, "Missing key.*attention.q_norm.weight"),
        (lambda state: state, {"num_heads": 5}, "dim must be a multiple of num_heads, got 12 and"),
    ],
)
def test_other_weights_are_refused(change, said, message):
    state = Block().state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        layer_from_dit_state(state, **STATE | said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, "norm must be layer in a DiT block, got rms"),
        ({"affine": True}, "affine must be False in a DiT block, got True"),
        ({"mlp": "swiglu"}, "mlp must be gelu in a DiT block, got swiglu"),
        ({"eps": 1e-5}, "eps must be 1e-06 in a DiT block, got 1e-05"),
    ],
)
def test_a_layer_that_dit_does_not_have_is_refused(options, message):
    config = replace(LayerConfig(D, H, HIDDEN, COND), **options)
    with pytest.raises(ValueError, match=message):
        dit_block_from_layer(AdaLNLayer(config))
