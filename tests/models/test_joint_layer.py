"""The layer of two streams, against its equations by torch's own modules."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise
from ops.one_layer import EVERY_POLICY, assert_same_bits, saved_bytes
from torch import nn

from dbkernels.models import JointConfig, JointLayer
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference

B, T, S, D, H, C = 3, 4, 5, 12, 3, 7  # T tokens of the context, S of x
CONFIG = JointConfig(D, H, 20, C)
SETTINGS = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "bias": False, "eps": 0.1}
KINDS = {
    "both": {},
    "settings": SETTINGS,
    "keys": {"context_pre_only": True, "mlp": "gelu_exact", "bias": ("fc1",)},
    "dual": {"dual_attention": True, "qk_norm": True, "head_dim": 6},
    "dual keys": {"dual_attention": True, "context_pre_only": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, **options):
    torch.manual_seed(3)
    return randomise(JointLayer(replace(CONFIG, **KINDS[kind] | options)))


def inputs(config, dtype=torch.float32):
    """The arguments of a call, with means of the streams far from zero."""
    torch.manual_seed(4)
    x, context = (torch.randn(B, n, config.dim, dtype=dtype) + 2 for n in (S, T))
    c = torch.randn(B, config.cond_dim, dtype=dtype)
    rotary = rotary_table(torch.arange(T + S), config.head_dim or config.dim // config.num_heads)
    return {"x": x, "context": context, "c": c, "rotary": rotary}


def heads(layer, attention, y):
    """Queries, keys and values of an attention, (B, tokens, H, d) each."""
    q, k, v = attention.qkv(y).unflatten(-1, (3, layer.config.num_heads, -1)).unbind(2)
    return (attention.q_norm(q), attention.k_norm(k), v) if layer.config.qk_norm else (q, k, v)


def attend(q, k, v):
    return F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2).flatten(2)  # fmt: skip


def equations(layer, x, context, c, rotary):
    config = layer.config

    def norm(y):
        kinds = {"layer": F.layer_norm, "rms": F.rms_norm}
        return kinds[config.norm](y, (config.dim,), eps=config.eps)

    def parts(stream, count):
        m = F.linear(F.silu(c), stream.modulation.weight, stream.modulation.bias)
        return m[:, None].chunk(count, -1)

    def with_mlp(stream, y, shift, scale, gate):
        h = stream.mlp.fc1((1 + scale) * norm(y) + shift)
        if config.mlp == "swiglu":
            a, b = h.chunk(2, -1)
            h = F.silu(a) * b
        else:
            h = F.gelu(h, approximate="none" if config.mlp == "gelu_exact" else "tanh")
        return y + gate * stream.mlp.fc2(h)

    of_x = parts(layer.x, 9 if config.dual_attention else 6)
    if config.context_pre_only:
        scale, shift = of_context = parts(layer.context, 2)
    else:
        shift, scale, *_ = of_context = parts(layer.context, 6)
    streams = heads(layer, layer.context.attention, (1 + scale) * norm(context) + shift)
    of_both = heads(layer, layer.x.attention, (1 + of_x[1]) * norm(x) + of_x[0])
    q, k, v = (torch.cat(pair, 1) for pair in zip(streams, of_both, strict=True))
    if rotary is not None:
        q, k = (reference.rotate(t, rotary) for t in (q, k))
    b, a = attend(q, k, v).split([context.shape[1], x.shape[1]], 1)
    x_norm = norm(x)
    x = x + of_x[2] * layer.x.attention.out(a)
    if config.dual_attention:
        shift, scale, gate = of_x[6:]
        own = attend(*heads(layer, layer.second, (1 + scale) * x_norm + shift))
        x = x + gate * layer.second.out(own)
    x = with_mlp(layer.x, x, *of_x[3:6])
    if config.context_pre_only:
        return x, None
    context = context + of_context[2] * layer.context.attention.out(b)
    return x, with_mlp(layer.context, context, *of_context[3:])


def with_gradients(layer, run, given):
    """The outputs, and the gradient in the streams, in c and in each parameter."""
    given = {n: t.detach().requires_grad_(n != "rotary") for n, t in given.items()}
    outs = [out for out in run(**given) if out is not None]
    douts = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) for out in outs]
    leaves = [given[n] for n in ("x", "context", "c")] + list(layer.parameters())
    return *outs, *torch.autograd.grad(outs, leaves, douts)


@every_kind
@pytest.mark.parametrize("rotated", [False, True])
def test_agrees_with_its_equations(kind, rotated):
    layer = made(kind).double()
    given = inputs(layer.config, torch.float64)
    if not rotated:
        del given["rotary"]
    run = {} if rotated else {"rotary": None}
    expected = with_gradients(layer, lambda **g: equations(layer, **run, **g), given)
    for recompute in EVERY_POLICY:
        layer.config = replace(layer.config, recompute=recompute)
        actual = with_gradients(layer, layer, given)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    layer.run = lambda layer, *streams: layer.stock(*streams)
    actual = with_gradients(layer, layer, given)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


CHANGES = {"dim": 24, "num_heads": 2, "mlp_hidden": 8, "cond_dim": 5, "norm": "rms"}
CHANGES |= {"mlp": "swiglu", "qk_norm": True, "bias": ("qkv",), "eps": 0.5, "qk_eps": 0.5}
CHANGES |= {"head_dim": 6, "context_pre_only": True, "dual_attention": True}


@pytest.mark.parametrize("name", sorted({f.name for f in fields(JointConfig)} - {"recompute"}))
def test_every_option_changes_the_layer(name):
    before = {"qk_norm": name == "qk_eps"}
    layer, other = made("both", **before), made("both", **{**before, name: CHANGES[name]})
    given = inputs(layer.config) | {"rotary": None}
    shapes = [[p.shape for p in each.parameters()] for each in (layer, other)]
    assert shapes[0] != shapes[1] or not torch.allclose(layer(**given)[0], other(**given)[0])


@every_kind
def test_a_new_layer_returns_its_inputs_bitwise_and_initialise_spares_the_modulation(kind):
    layer = JointLayer(replace(CONFIG, **KINDS[kind]))
    layer.initialise(nn.init.ones_)
    assert all((p == 1).all() for n, p in layer.named_parameters() if n.endswith("qkv.weight"))
    assert not any(p.any() for n, p in layer.named_parameters() if n.endswith("bias"))
    layer.initialise(nn.init.xavier_uniform_)
    given = inputs(layer.config)
    x, context = layer(**given)
    assert torch.equal(x, given["x"])
    assert context is None if "keys" in kind else torch.equal(context, given["context"])


def test_the_names_of_its_state_dict_do_not_change():
    stream = {"modulation", "attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2"}
    found = {
        kind: {name.rpartition(".")[0] for name in made(kind, qk_norm=False).state_dict()}
        for kind in KINDS
    }
    both = {f"{side}.{name}" for side in ("x", "context") for name in stream}
    keys = {f"x.{name}" for name in stream} | {"context.modulation", "context.attention.qkv"}
    second = {"second.qkv", "second.out"}
    assert found["both"] == both and found["keys"] == keys
    assert found["dual"] == both | second and found["dual keys"] == keys | second
    names = made("both", qk_norm=True).state_dict().keys() - made("both").state_dict().keys()
    assert names == {
        f"{side}.attention.{norm}_norm.weight" for side in ("x", "context") for norm in "qk"
    }


@every_kind
def test_each_policy_keeps_less_and_gives_the_same_gradients(kind):
    kept, results = [], []
    for recompute in EVERY_POLICY:
        layer = made(kind, recompute=recompute, mlp_hidden=4 * D)
        given = inputs(layer.config)
        kept.append(saved_bytes(lambda layer=layer, given=given: layer(**given)[0]))
        sum(out.square().sum() for out in layer(**given) if out is not None).backward()
        results.append({name: p.grad for name, p in layer.named_parameters()})
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(EVERY_POLICY) - 1
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_condition_of_one_stands_for_all():
    layer = made("dual").double()
    given = inputs(layer.config, torch.float64)
    one, whole = given["c"][:1], given["c"][:1].expand(B, C)
    results = (layer(**given | {"c": c}) for c in (one, whole))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_samples_do_not_see_each_other_and_both_streams_do():
    layer, given = made("both"), inputs(CONFIG)
    before = layer(**given)
    changed = given | {"context": given["context"].clone()}
    changed["context"][1] += 1
    for old, new in zip(before, layer(**changed), strict=True):
        moved = (old != new).flatten(1).any(1).tolist()
        assert moved == [False, True, False]


def test_has_shapes_before_it_has_weights():
    with torch.device("meta"):
        layer = JointLayer(replace(CONFIG, dim=8 * H, dual_attention=True))
        given = {name: t.to("meta") for name, t in inputs(layer.config).items()}
        x, context = layer(**given)
        assert x.shape == (B, S, 8 * H) and context.shape == (B, T, 8 * H)
        (x.sum() + context.sum()).backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("inside", ["x.mlp.fc1", "context.attention.qkv", "second.out"])
def test_a_change_to_a_module_that_is_never_called_is_refused(inside):
    layer = made("dual")
    layer.get_submodule(inside).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"never calls them: {inside} must be a plain Linear"):
        layer(**inputs(layer.config))


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
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        JointLayer(replace(CONFIG, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 11)}, r"x must be \(B, S, D\) with D = 12, got \(3, 5, 11\)"),
        ({"context": torch.zeros(3, 4, 11)}, r"context must be \(B, T, D\) with D = 12"),
        ({"context": torch.zeros(2, 4, 12)}, "context must have the samples of x, 3, got 2"),
        ({"c": torch.zeros(2, 7)}, r"c must be \(B, cond_dim\) = \(3, 7\) or .*, got \(2, 7\)"),
        ({"rotary": torch.zeros(2, 5, 4)}, r"rotary must be \(2, T, d\) = \(2, 9, 4\)"),
        ({"x": torch.zeros(3, 5, 12).double()}, "context must have the dtype of x"),
    ],
)
def test_rejects_a_wrong_input_by_its_own_name(change, message):
    with pytest.raises(ValueError, match=message):
        made("both")(**inputs(CONFIG) | change)
