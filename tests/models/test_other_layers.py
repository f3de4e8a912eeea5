"""Layers beside the AdaLN layer, against their equations by torch's own modules."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise
from ops.one_layer import EVERY_POLICY, assert_same_bits, saved_bytes
from torch import nn

from dbkernels.models import CrossConfig, CrossLayer, ParallelConfig, ParallelLayer
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference

B, T, D, H, C = 3, 5, 12, 3, 7
S, W = 6, 9  # of the context: tokens and their width
PARALLEL, CROSS = ParallelConfig(D, H, 20, C), CrossConfig(D, H, 20, C, W)
SETTINGS = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "bias": False, "eps": 0.1}
OPTIONS = [{}, SETTINGS, {"mlp": "gelu_exact", "bias": ("fc1",)}]
KINDS = {"parallel": (ParallelLayer, PARALLEL), "cross": (CrossLayer, CROSS)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, **options):
    layer, config = KINDS[kind]
    torch.manual_seed(3)
    return randomise(layer(replace(config, **options)))


def inputs(layer, *, per_token=False, dtype=torch.float32):
    """The arguments of a call, with a mean of x far from zero."""
    config = layer.config
    x = torch.randn(B, T, config.dim, dtype=dtype) + 2
    c = torch.randn((B, T, config.cond_dim) if per_token else (B, config.cond_dim), dtype=dtype)
    rotary = rotary_table(torch.arange(T), config.attention_width // config.num_heads)
    given = {"x": x, "c": c, "rotary": rotary}
    if isinstance(config, CrossConfig):
        given["context"] = torch.randn(B, S, config.context_dim, dtype=dtype)
        given["lengths"] = torch.tensor([S, 2, 1])
    return given


def attended(layer, y, rotary):
    config, attention = layer.config, layer.attention
    q, k, v = attention.qkv(y).unflatten(-1, (3, config.num_heads, -1)).unbind(2)
    if config.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        q, k = (reference.rotate(t, rotary) for t in (q, k))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))


def normed(layer, x):
    shape, eps = x.shape[-1:], layer.config.eps
    kinds = {"layer": F.layer_norm, "rms": F.rms_norm}
    return kinds[layer.config.norm](x, shape, eps=eps)


def activated(layer, y):
    h = layer.mlp.fc1(y)
    if layer.config.mlp == "swiglu":
        a, b = h.chunk(2, -1)
        return F.silu(a) * b
    return F.gelu(h, approximate={"gelu": "tanh", "gelu_exact": "none"}[layer.config.mlp])


def parallel_equations(layer, x, c, rotary):
    m = F.linear(F.silu(c), layer.modulation.weight, layer.modulation.bias)
    shift, scale, gate = reference.over_tokens(m).chunk(3, dim=-1)
    y = (1 + scale) * normed(layer, x) + shift
    both = [attended(layer, y, rotary).transpose(1, 2).flatten(2), activated(layer, y)]
    weight = torch.cat([layer.attention.out.weight, layer.mlp.fc2.weight], 1)
    return x + gate * F.linear(torch.cat(both, 2), weight, layer.mlp.fc2.bias)


def cross_equations(layer, x, c, context, lengths, rotary):
    m = F.linear(F.silu(c), layer.modulation.weight, layer.modulation.bias)
    shift1, scale1, gate1, shift2, scale2, gate2 = reference.over_tokens(m).chunk(6, dim=-1)
    y = (1 + scale1) * normed(layer, x) + shift1
    a = attended(layer, y, rotary).transpose(1, 2).flatten(2)
    x = x + gate1 * layer.attention.out(a)
    heads = (layer.config.num_heads, -1)
    q, kv = layer.cross.q(x).unflatten(-1, heads), layer.cross.kv(context)
    k, v = kv.unflatten(-1, (2, *heads)).unbind(2)
    seen = (torch.arange(S) < lengths[:, None])[:, None, None]
    given = (t.transpose(1, 2) for t in (q, k, v))
    h = F.scaled_dot_product_attention(*given, attn_mask=seen).transpose(1, 2).flatten(2)
    x = x + layer.cross.out(h)
    y = (1 + scale2) * normed(layer, x) + shift2
    return x + gate2 * layer.mlp.fc2(activated(layer, y))


EQUATIONS = {"parallel": parallel_equations, "cross": cross_equations}


def with_gradients(layer, run, given):
    """The output, and the gradient in x, in c and in each parameter."""
    floats = ("x", "c", "context")
    given = {n: t.detach().requires_grad_() if n in floats else t for n, t in given.items()}
    leaves = [*(given[n] for n in floats if n in given), *layer.parameters()]
    out = run(**given)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad(out, leaves, dout)


@every_kind
@pytest.mark.parametrize(
    "options", [{}, SETTINGS, {"mlp": "gelu_exact", "bias": ("fc1",)}], ids=str
)
@pytest.mark.parametrize("per_token", [False, True])
def test_agrees_with_its_equations(kind, options, per_token):
    layer = made(kind, **options).double()
    given = inputs(layer, per_token=per_token, dtype=torch.float64)
    expected = with_gradients(layer, lambda **told: EQUATIONS[kind](layer, **told), given)
    for recompute in EVERY_POLICY:
        layer.config = replace(layer.config, recompute=recompute)
        actual = with_gradients(layer, layer, given)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    layer.run = lambda layer, x, c, *given: layer.specified(x, layer.modulation(F.silu(c)), *given)
    actual = with_gradients(layer, layer, given)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


CHANGES = {"dim": 24, "num_heads": 2, "mlp_hidden": 8, "cond_dim": 5, "norm": "rms"}
CHANGES |= {"mlp": "swiglu", "qk_norm": True, "bias": ("qkv",), "eps": 0.5, "qk_eps": 0.5}
CHANGES |= {"head_dim": 6, "context_dim": 4}


@every_kind
def test_every_option_changes_the_layer(kind):
    named = {f.name for f in fields(KINDS[kind][1])} - {"recompute"}
    for name in named:
        before = {"qk_norm": name == "qk_eps"}
        layer, other = made(kind, **before), made(kind, **{**before, name: CHANGES[name]})
        shapes = [[p.shape for p in each.parameters()] for each in (layer, other)]
        given = inputs(layer) | {"rotary": None}
        same = shapes[0] == shapes[1] and torch.allclose(layer(**given), other(**given))
        assert not same, name


@every_kind
def test_a_new_layer_returns_its_input_bitwise_and_initialise_spares_the_modulation(kind):
    layer = KINDS[kind][0](KINDS[kind][1])
    layer.initialise(nn.init.ones_)
    assert all((p == 1).all() for n, p in layer.named_parameters() if n.endswith("fc1.weight"))
    assert not any(p.any() for n, p in layer.named_parameters() if n.endswith("bias"))
    layer.initialise(nn.init.xavier_uniform_)
    given = inputs(layer)
    assert torch.equal(layer(**given), given["x"])


NAMES = {"parallel": {"attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2", "modulation"}}
NAMES["cross"] = NAMES["parallel"] | {"cross.q", "cross.kv", "cross.out"}


@every_kind
def test_the_names_of_its_state_dict_do_not_change(kind):
    weights = {f"{name}.weight" for name in NAMES[kind]}
    biases = {f"{name}.bias" for name in NAMES[kind]}
    biases -= {"attention.out.bias"} if kind == "parallel" else set()
    assert made(kind).state_dict().keys() == weights | biases
    heads = {"attention.q_norm.weight", "attention.k_norm.weight"}
    without = made(kind, bias=False, qk_norm=True).state_dict().keys()
    assert without == weights | heads | {"modulation.bias"}


@every_kind
def test_each_policy_keeps_less_and_gives_the_same_gradients(kind):
    kept, results = [], []
    for recompute in EVERY_POLICY:
        layer = made(kind, recompute=recompute, qk_norm=True, mlp_hidden=4 * D)
        torch.manual_seed(4)
        given = inputs(layer)
        kept.append(saved_bytes(lambda layer=layer, given=given: layer(**given)))
        layer(**given).square().sum().backward()
        results.append({name: p.grad for name, p in layer.named_parameters()})
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(EVERY_POLICY) - 1
    for result in results[1:]:
        assert_same_bits(result, results[0])


@every_kind
def test_a_condition_of_one_stands_for_all(kind):
    layer = made(kind).double()
    given = inputs(layer, dtype=torch.float64)
    one = given | {"c": given["c"][:1]}
    whole = given | {"c": given["c"][:1].expand(B, T, C)}
    torch.testing.assert_close(layer(**one), layer(**whole), rtol=1e-12, atol=1e-12)


@every_kind
def test_has_shapes_before_it_has_weights(kind):
    with torch.device("meta"):
        layer = KINDS[kind][0](replace(KINDS[kind][1], dim=8 * H))
        given = {name: t.to("meta") for name, t in inputs(layer).items()}
        y = layer(**given)
        assert y.shape == (B, T, 8 * H)
        y.sum().backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@every_kind
def test_a_change_to_a_module_that_is_never_called_is_refused(kind):
    layer = made(kind)
    layer.mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"never calls them: mlp\.fc1 must be a plain Linear"):
        layer(**inputs(layer))


@every_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, got batch"),
        ({"mlp": "relu"}, "mlp must be one of gelu, gelu_exact, swiglu, got relu"),
        ({"bias": ("qkv", "fc3")}, "bias must be one of qkv, .*, got fc3"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got 12 and 5"),
        ({"recompute": "all"}, "recompute must be one of none, .*, got all"),
    ],
)
def test_rejects(kind, options, message):
    layer, config = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        layer(replace(config, **options))


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 11)}, r"x must be \(B, T, D\) with D = 12, got \(3, 5, 11\)"),
        ({"c": torch.zeros(2, 7)}, r"c must be \(B, cond_dim\) = \(3, 7\) or .*, got \(2, 7\)"),
        ({"rotary": torch.zeros(2, 4, 4)}, r"rotary must be \(2, T, d\) = \(2, 5, 4\)"),
    ],
)
def test_rejects_a_wrong_input_by_its_own_name(kind, change, message):
    layer = made(kind)
    with pytest.raises(ValueError, match=message):
        layer(**inputs(layer) | change)


def test_the_one_bias_of_a_parallel_layer_is_that_of_its_mlp():
    with pytest.raises(ValueError, match="bias must be one of qkv, fc1, fc2, got out"):
        ParallelLayer(replace(PARALLEL, bias=("out",)))
