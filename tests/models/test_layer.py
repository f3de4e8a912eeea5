"""One layer and a stack of them, against the equations of layer.py by torch's own modules."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise
from ops.one_layer import EVERY_POLICY, SAME_BITS, assert_same_bits, saved_bytes
from torch import nn

from dbkernels.models.baseline import stock_layer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import Draw, reference

B, T, D, H = 3, 5, 12, 3
CONFIG = LayerConfig(dim=D, num_heads=H, mlp_hidden=20, cond_dim=7)
OPTIONS = [
    LayerConfig(D, H, 20, 7, norm, affine, mlp, qk_norm, bias, eps=0.01)
    for norm, affine, mlp, qk_norm, bias in product(
        ["layer", "rms"], [False, True], ["gelu", "gelu_exact", "swiglu"], *[[False, True]] * 2
    )
]
# what only some published layers have
RARE = [
    LayerConfig(D, H, 20, 7, affine=True, qk_norm=True, eps=0.01, eps2=0.3, qk_eps=0.2),
    LayerConfig(D, H, 20, 7, head_dim=6, qk_norm=True, bias=("qkv", "fc2")),
    LayerConfig(D, H, 20, 7, head_dim=2, affine=True, bias=("out", "fc1"), silu_modulation=True),
    LayerConfig(D, 5, 20, 7, head_dim=2, bias=()),
]
CHUNKS = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
PROJECTIONS = ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
FUSED = replace(CONFIG, affine=True, qk_norm=True)


def inputs(dtype=torch.float32, *, per_token=False):
    # a mean far from zero tells layer norm from RMS norm
    x = torch.randn(B, T, D, dtype=dtype) + 2
    return x, torch.randn((B, T, 7) if per_token else (B, 7), dtype=dtype)


def rotary(config=CONFIG):
    return rotary_table(torch.arange(T), config.attention_width // config.num_heads)


def equations(layer, x, c, rotary):
    m = F.linear(F.silu(c), layer.modulation.weight, layer.modulation.bias)
    m = F.silu(m) if layer.config.silu_modulation else m
    shift1, scale1, gate1, shift2, scale2, gate2 = reference.over_tokens(m).chunk(6, dim=-1)
    qkv = layer.attention.qkv((1 + scale1) * layer.norm1(x) + shift1)
    q, k, v = qkv.unflatten(-1, (3, layer.config.num_heads, -1)).unbind(2)
    if layer.config.qk_norm:
        q, k = layer.attention.q_norm(q), layer.attention.k_norm(k)
    if rotary is not None:
        q, k = (reference.rotate(t, rotary) for t in (q, k))
    a = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    x = x + gate1 * layer.attention.out(a.transpose(1, 2).flatten(2))
    h = layer.mlp.fc1((1 + scale2) * layer.norm2(x) + shift2)
    if layer.config.mlp == "swiglu":
        return x + gate2 * layer.mlp.fc2(F.silu(h[..., :20]) * h[..., 20:])
    approximate = {"gelu": "tanh", "gelu_exact": "none"}[layer.config.mlp]
    return x + gate2 * layer.mlp.fc2(F.gelu(h, approximate=approximate))


def with_gradients(modules, run, x, c, *rest):
    """The output, and the gradient in x, in c and in each parameter."""
    x, c = (t.detach().requires_grad_() for t in (x, c))
    out = run(x, c, *rest)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out, *torch.autograd.grad(out, [x, c, *nn.ModuleList(modules).parameters()], dout)


@pytest.mark.parametrize("config", OPTIONS + RARE)
def test_a_new_layer_returns_its_input_bitwise(config):
    layer = AdaLNLayer(config)
    x, c = inputs()
    assert torch.equal(layer(x, c), x) and torch.equal(layer(x, c, rotary(config)), x)


@pytest.mark.parametrize("config", OPTIONS + RARE)
def test_agrees_with_the_equations(config):
    layer = randomise(AdaLNLayer(config)).double()
    for per_token, table in product([False, True], [None, rotary(config)]):
        args = *inputs(torch.float64, per_token=per_token), table
        runs = layer, partial(equations, layer)
        actual, expected = (with_gradients([layer], run, *args) for run in runs)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_queries", [1, T - 1, T])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("config", [OPTIONS[0], replace(OPTIONS[-1], recompute="qkv")])
def test_the_first_tokens_of_a_stack_are_the_first_of_all(config, depth, per_token, num_queries):
    layers, shapes = [randomise(AdaLNLayer(config)).double() for _ in range(depth)], []
    args = *inputs(torch.float64, per_token=per_token), rotary()
    whole = with_gradients(layers, lambda *a: run_layers(layers, *a)[:, :num_queries], *args)
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: shapes.append(out.shape[1]))
    some = with_gradients(layers, lambda *a: run_layers(layers, *a, num_queries), *args)
    assert shapes == [T] * (depth - 1) + [num_queries]
    torch.testing.assert_close(some, whole, rtol=1e-10, atol=1e-10)


def by_specification(layers, x, c, rotary, attention):
    """Each layer in plain torch, one after another."""
    for layer in layers:
        x = stock_layer(layer, x, c, rotary, None, attention)
    return x


@pytest.mark.parametrize("asked", [None, "causal", "two_stream"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("config", [OPTIONS[0], replace(OPTIONS[-1], recompute="layer")])
def test_a_stack_has_one_attention_and_its_last_layer_the_noisy_stream_alone(
    config, depth, per_token, asked
):
    layers, shapes = [randomise(AdaLNLayer(config)).double() for _ in range(depth)], []
    (x, c), attention = inputs(torch.float64, per_token=per_token), asked or "full"
    args = torch.cat([x, x + 1]), torch.cat([c, c.flip(0)]), rotary()
    wanted = B if asked == "two_stream" else None
    run = partial(run_layers, layers, attention=attention, num_samples=wanted)
    exact = with_gradients(
        layers, lambda *a: by_specification(layers, *a, attention)[:wanted], *args
    )
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: shapes.append(len(out)))
    torch.testing.assert_close(with_gradients(layers, run, *args), exact, rtol=1e-10, atol=1e-10)
    assert shapes == [2 * B] * (depth - 1) + [wanted or 2 * B]


def test_no_layer_gives_the_first_of_x():
    x, c = torch.randn(2 * B, T, D), torch.randn(2 * B, 7)
    assert run_layers([], x, c) is x
    assert torch.equal(run_layers([], x, c, num_queries=2), x[:, :2])
    noisy = run_layers([], x, c, attention="two_stream", num_samples=B)
    assert torch.equal(noisy, x[:B])


# of the text families' design: two layers keep 11 units of each stream, and the last one 11 of the
# noisy one and x, k and v of the clean one. In a stack the second and the third keep no x
@pytest.mark.parametrize(("together", "units"), [(False, 58), (True, 58 - 2 * 2)])
def test_a_block_of_two_streams_keeps_of_the_last_clean_rows_three_units(together, units):
    width, heads, tokens = 192, 3, 128
    config = LayerConfig(width, heads, 4 * width, 7)
    layers = [randomise(AdaLNLayer(config)) for _ in range(3)]
    x, c, told = torch.randn(4, tokens, width), torch.randn(4, 7), {"attention": "two_stream"}
    parameters = [p for layer in layers for p in layer.parameters()]

    def one_by_one():
        y = layers[1](layers[0](x, c, **told), c, **told)
        return layers[2](y, c, num_samples=2, **told)

    def stack():
        return run_layers(layers, x, c, num_samples=2, **told)

    kept = saved_bytes(stack if together else one_by_one, but=[c, *parameters])
    kept /= 2 * tokens * width * 4
    # logsumexp, statistics and modulation come on top
    assert units <= kept <= 1.02 * units


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rejects_more_tokens_than_there_are(depth):
    message = r"num_queries must be an integer from 1 to T = 5, or None, got 6"
    with pytest.raises(ValueError, match=message):
        run_layers([AdaLNLayer(CONFIG)] * depth, *inputs(), num_queries=6)


def test_a_stack_keeps_its_residual_stream_once():
    layers = [randomise(AdaLNLayer(CONFIG)) for _ in range(3)]
    order = [layers[i] for i in (0, 1, 1, 2)]  # a layer may come again
    x, c = inputs()

    def one_by_one():
        y = x
        for layer in order:
            y = layer(y, c)
        return y

    assert torch.equal(one_by_one(), run_layers(order, x, c))
    once = saved_bytes(lambda: run_layers(order, x, c))
    assert saved_bytes(one_by_one) - once == 3 * x.nbytes


def test_a_new_layer_learns_through_its_gates_first():
    layer = AdaLNLayer(CONFIG)
    layer(*inputs()).square().sum().backward()
    chunks = dict(zip(CHUNKS, layer.modulation.bias.grad.chunk(6), strict=True))
    assert {name for name, grad in chunks.items() if grad.any()} == {"gate1", "gate2"}
    assert not layer.attention.qkv.weight.grad.any() and not layer.mlp.fc2.weight.grad.any()


def test_options_add_and_remove_parameters():
    def shapes(**options):
        state = AdaLNLayer(replace(CONFIG, **options)).state_dict()
        return {name: tuple(t.shape) for name, t in state.items()}

    weights = dict(zip(PROJECTIONS, [(36, 12), (12, 12), (20, 12), (12, 20)], strict=True))
    weights["modulation"] = (72, 7)
    default = {f"{name}.weight": shape for name, shape in weights.items()}
    default |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    norms = {f"norm{i}.{name}": (12,) for i in (1, 2) for name in ("weight", "bias")}
    rms = {name: shape for name, shape in norms.items() if "weight" in name}
    heads = {"attention.q_norm.weight": (4,), "attention.k_norm.weight": (4,)}
    assert shapes() == default
    assert shapes(affine=True) == default | norms
    assert shapes(affine=True, norm="rms") == default | rms
    assert shapes(qk_norm=True) == default | heads
    wide = {"mlp.fc1.weight": (40, 12), "mlp.fc1.bias": (40,)}
    assert shapes(mlp="swiglu") == default | wide
    biases = {f"{name}.bias" for name in PROJECTIONS}
    assert shapes(bias=False) == {n: shape for n, shape in default.items() if n not in biases}
    some = biases - {"attention.qkv.bias", "mlp.fc2.bias"}
    told = shapes(bias=("qkv", "fc2"))
    assert told == {n: shape for n, shape in default.items() if n not in some}
    wide = {"attention.qkv.weight": (90, 12), "attention.qkv.bias": (90,)}
    assert shapes(head_dim=10) == default | wide | {"attention.out.weight": (12, 30)}


@pytest.mark.parametrize("bias", [False, True])
def test_initialise_sets_the_projections_and_nothing_else(bias):
    layer = randomise(AdaLNLayer(replace(FUSED, bias=bias)))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.initialise(nn.init.ones_)
    for name, parameter in layer.named_parameters():
        part, _, kind = name.rpartition(".")
        if part in PROJECTIONS:
            assert (parameter == (1 if kind == "weight" else 0)).all(), name
        else:
            assert torch.equal(parameter, before[name]), name


# what running as one op asks of the modules, and leaves to their users


def gradients(layer, *args):
    layer.zero_grad()
    layer(*args).square().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def test_each_policy_reaches_the_op_and_gives_the_same_gradients():
    weights, args = randomise(AdaLNLayer(FUSED)).state_dict(), (*inputs(), rotary())
    kept_bytes, results = [], []
    for recompute in EVERY_POLICY:
        layer = AdaLNLayer(replace(FUSED, recompute=recompute))
        layer.load_state_dict(weights)
        kept_bytes.append(saved_bytes(lambda layer=layer: layer(*args)))
        results.append(gradients(layer, *args))
    assert kept_bytes == sorted(kept_bytes, reverse=True)
    # in float32 there is nothing to round
    assert len(set(kept_bytes)) == len(SAME_BITS) == len(EVERY_POLICY) - 1
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_hooks_of_the_layer_of_its_condition_and_of_parameters_run():
    layer, seen, named = randomise(AdaLNLayer(FUSED)), [], []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.modulation.register_forward_hook(lambda *_: seen.append("modulation"))
    layer.register_forward_hook(lambda module, args, y: seen.append("after") or 0 * y)
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_hook(lambda *_: seen.append("done"))
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: named.append(name))
    x, c = inputs()
    y = layer(x.requires_grad_(), c, rotary())
    assert not y.any()
    y.sum().backward()
    assert seen == ["before", "modulation", "after", "backward", "done"]
    assert sorted(named) == sorted(name for name, _ in layer.named_parameters())


def test_takes_the_weights_of_a_functional_call():
    layer, args = randomise(AdaLNLayer(FUSED)), (*inputs(), rotary())
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


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("shape", [(B, 7), (B, T, 7)])
def test_has_shapes_before_it_has_weights(shape, recompute):
    with torch.device("meta"):
        # heads that a GPU takes
        config = replace(FUSED, dim=8 * H, recompute=recompute, dropout=0.1, attention_dropout=0.1)
        layer, draw = AdaLNLayer(config), Draw(1, torch.empty((), dtype=torch.int64))
        y = layer(torch.empty(B, T, 8 * H), torch.empty(shape), draw=draw)
        assert y.shape == (B, T, 8 * H)
        y.sum().backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize(
    ("B", "T", "shape"),
    [(3, 5, (1, 7)), (3, 5, (3, 1, 7)), (3, 5, (1, 1, 7)), (3, 5, (1, 5, 7)), (1, 1, (1, 1, 7)),
     (2, 1, (2, 1, 7)), (0, 5, (1, 7)), (0, 5, (0, 1, 7))],
)  # fmt: skip
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_a_condition_of_one_stands_for_all(recompute, B, T, shape):
    layer = randomise(AdaLNLayer(replace(FUSED, recompute=recompute))).double()
    x, c = torch.randn(B, T, D).double(), torch.randn(shape).double().requires_grad_()
    whole = c.expand(B, T, 7) if c.dim() == 3 else c.expand(B, 7)
    apart = whole.detach().clone().requires_grad_()
    actual, expected = layer(x, c), layer(x, apart)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), c),
        torch.autograd.grad(whole, c, torch.autograd.grad(expected.square().sum(), apart)),
        rtol=1e-10,
        atol=1e-10,
    )
    layer.run = stock_layer
    torch.testing.assert_close(layer(x, c), actual, rtol=1e-10, atol=1e-10)


OF_C = r"c must be \(B, cond_dim\) = \(3, 7\) or \(B, T, cond_dim\) = \(3, 5, 7\), .*, got "


@pytest.mark.parametrize(
    ("x", "c", "message"),
    [
        ((5, 12), (3, 7), r"x must be \(B, T, D\) with D = 12, got \(5, 12\)"),
        ((3, 5, 11), (3, 7), r"x must be \(B, T, D\) with D = 12, got \(3, 5, 11\)"),
        ((3, 1, 5, 12), (3, 7), r"x must be \(B, T, D\) with D = 12, got \(3, 1, 5, 12\)"),
        ((3, 5, 12), (3, 6), OF_C + r"\(3, 6\)"),
        ((3, 5, 12), (2, 7), OF_C + r"\(2, 7\)"),
        ((3, 5, 12), (7,), OF_C + r"\(7,\)"),
        ((3, 5, 12), (), OF_C + r"\(\)"),
        ((3, 5, 12), (3, 2, 7), OF_C + r"\(3, 2, 7\)"),
        ((3, 5, 12), (2, 5, 7), OF_C + r"\(2, 5, 7\)"),
        ((3, 5, 12), (3, 1, 1, 7), OF_C + r"\(3, 1, 1, 7\)"),
        ((3, 5, 12), (0, 7), OF_C + r"\(0, 7\)"),
    ],
)
@pytest.mark.parametrize("run", [None, stock_layer])
def test_rejects_a_wrong_input_by_its_own_name(x, c, message, run):
    layer = AdaLNLayer(CONFIG)
    layer.run = run
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(x), torch.zeros(c))


@pytest.mark.parametrize("run", [None, stock_layer])
def test_rejects_what_its_attention_has_no_use_for(run):
    layer = AdaLNLayer(replace(CONFIG, attention_dropout=0.1))
    layer.run = run
    args = torch.zeros(3, 5, D), torch.zeros(3, 7)
    for attention, message in (
        ("causal", "attention_dropout must be 0 with attention causal, got 0.1"),
        ("local", "attention must be one of full, causal, two_stream, got local"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*args, attention=attention)
    for told, message in (
        ({"attention": "two_stream"}, "two streams must have 2B samples, .*, got 3"),
        ({"num_samples": 1}, "num_samples must be None with attention full, got 1"),
    ):
        layer = AdaLNLayer(CONFIG)
        layer.run = run
        with pytest.raises(ValueError, match=message):
            layer(*args, **told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x.long(), c), "x must be one of float32, .*, got torch.int64"),
        (lambda x, c: (x, c.bool()), "c must be one of float32, .*, got torch.bool"),
        (lambda x, c: (x, c.to("meta")), "x and c must be on one device, got cpu, meta"),
    ],
)
def test_rejects_a_wrong_kind_of_input_by_its_own_name(change, message):
    with pytest.raises(ValueError, match=message):
        AdaLNLayer(CONFIG)(*change(*inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, got batch"),
        ({"mlp": "relu"}, "mlp must be one of gelu, gelu_exact, swiglu, got relu"),
        ({"bias": ("qkv", "fc3")}, "bias must be one of qkv, out, fc1, fc2, got fc3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be in \[0, 1\), got -0.1"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got 12 and 5"),
        (
            {"recompute": "all"},
            "recompute must be one of none, attention, mlp, qkv, layer, layer_narrow, got all",
        ),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLNLayer(replace(CONFIG, **options))
