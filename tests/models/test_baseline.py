import copy
from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models.tiny import make_model, randomise
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.measure import record
from dbkernels.models import AdaLNLayer, LayerConfig
from dbkernels.models.baseline import BASELINES, by_method, stock_layer, use_baseline
from dbkernels.models.layer import run_layers
from dbkernels.models.rotary import rotary_table

B, T, D, H = 3, 5, 12, 3
CONFIGS = [
    LayerConfig(D, H, 20, 7),
    LayerConfig(D, H, 20, 7, "rms", affine=True, mlp="swiglu", qk_norm=True, bias=False),
    LayerConfig(D, H, 20, 7, affine=True, eps=0.01),
]
CPU = torch.device("cpu")
each_method = pytest.mark.parametrize("method", BASELINES)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """torch.compile up to its graphs, which run as they are: kernels would take minutes."""
    import torch._inductor.compile_fx as inductor

    def graph_as_it_is(graph, inputs, **_):
        return make_boxed_func(graph.forward)

    whole = partial(inductor.compile_fx, inner_compile=graph_as_it_is)
    monkeypatch.setattr(inductor, "compile_fx", whole)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def baseline(layer, method):
    """A copy of a layer, run by plain torch."""
    layer = copy.deepcopy(layer)
    layer.run = by_method(stock_layer, method)
    return layer


def with_gradients(layer, x, c, rotary):
    x, c = (t.detach().to(layer.modulation.weight).requires_grad_() for t in (x, c))
    out = layer(x, c, rotary)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    names = ["x", "c", *(name for name, _ in layer.named_parameters())]
    gradients = torch.autograd.grad(out, [x, c, *layer.parameters()], dout)
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("config", CONFIGS)
@each_method
def test_numbers_and_gradients_are_those_of_the_specification(method, config):
    fused = randomise(AdaLNLayer(config))
    exact_layer = baseline(fused, "stock").double()
    given = torch.randn(B, T, D) + 2, torch.randn(B, 7), rotary_table(torch.arange(T), D // H)
    exact = with_gradients(exact_layer, *given)
    eager = with_gradients(baseline(fused, "stock"), *given)
    for layer in (baseline(fused, method), fused):
        for name, value in with_gradients(layer, *given).items():
            assert_as_accurate_as_eager(name, value, eager[name], exact[name])


@each_method
def test_the_first_tokens_are_taken_of_all(method):
    layer = baseline(randomise(AdaLNLayer(CONFIGS[0])), method)
    x, c = torch.randn(B, T, D, requires_grad=True), torch.randn(B, 7)
    whole, some = layer(x, c), layer(x, c, num_queries=2)
    assert torch.equal(some, whole[:, :2])
    # whoever keeps them does not keep the others
    assert some.untyped_storage().nbytes() == B * 2 * D * 4
    (expected,) = torch.autograd.grad(whole[:, :2].square().sum(), x)
    assert torch.equal(torch.autograd.grad(some.square().sum(), x)[0], expected)
    with pytest.raises(ValueError, match="num_queries must be an integer from 1 to T = 5, or"):
        layer(x, c, num_queries=0)


@each_method
@pytest.mark.parametrize("attention", ["causal", "two_stream"])
def test_a_method_has_every_attention(method, attention):
    fused = randomise(AdaLNLayer(CONFIGS[1])).double()
    layer, told = baseline(fused, method), {"attention": attention}
    told |= {"num_samples": 2} if attention == "two_stream" else {}
    x, c = torch.randn(4, T, D).double(), torch.randn(4, 7).double()
    results = []
    for each in (layer, fused):
        leaf = x.clone().requires_grad_()
        out = each(leaf, c, rotary_table(torch.arange(T), D // H), **told)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    # whoever keeps the first samples does not keep the others
    assert results[0][0].untyped_storage().nbytes() == results[0][0].numel() * 8


@each_method
def test_autocast_and_a_condition_of_each_token(method):
    fused = randomise(AdaLNLayer(CONFIGS[0]), std=0.1)
    x, c = torch.randn(B, T, D), torch.randn(B, T, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = baseline(fused, method)(x.requires_grad_(), c)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, fused(x, c), rtol=0.02, atol=0.05)


# units of B T D elements: small tensors of B D and of 4 statistics and H a token come on top
W, TOKENS = 64, 64
SAVED = [
    ("stock", 1.0, 20),
    ("checkpointed", 1.0, 1),
    # x, then qkv, the attention, its projection, fc1 and fc2
    ("selective", 1.0, 1 + 3 + 1 + 1 + 4 + 1),
    ("compiled", 1.0, 17),
    ("compiled", 0.75, 11),
    ("compiled", 0.5, 9),
    ("compiled", 0.25, 5),
    ("compiled", 0.1, 2),
    ("compiled", 0.0, 1),
]


def kept_units(method, budget, *, autocast=False):
    """What is alive after a forward because of it, but for its result, in units of x."""
    layer = AdaLNLayer(LayerConfig(W, 1, 4 * W, W))
    layer.run = by_method(stock_layer, method, budget=budget)
    x, c = torch.randn(2, TOKENS, W, requires_grad=True), torch.randn(2, W, requires_grad=True)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x, c)

    forward()  # compiles
    out = []
    trace = record(
        lambda: out.append(forward()), model=layer, optimizers=(), inputs=[x, c], device=CPU
    )
    *_, last = trace.moments()
    there = sum(t.nbytes for t in (*layer.parameters(), c))
    assert trace.saved <= last.total_bytes
    return (last.total_bytes - there) / out[0].nbytes - 1


@pytest.mark.parametrize(("method", "budget", "units"), SAVED)
def test_a_method_keeps_what_it_says(method, budget, units):
    with FakeTensorMode():
        kept = kept_units(method, budget)
    assert units <= kept < units + 0.35


@each_method
def test_a_prediction_keeps_the_bytes_of_a_run(method):
    run = kept_units(method, 1.0, autocast=True)
    with FakeTensorMode():
        assert kept_units(method, 1.0, autocast=True) == run


def test_fused_layers_and_baselines_may_stand_in_one_stack():
    fused = [randomise(AdaLNLayer(CONFIGS[0])) for _ in range(5)]
    mixed = [layer if i in (0, 1, 4) else baseline(layer, "stock") for i, layer in enumerate(fused)]
    x, c = torch.randn(B, T, D, requires_grad=True), torch.randn(B, 7)
    (expected,) = torch.autograd.grad(run_layers(fused, x, c).square().sum(), x)
    (actual,) = torch.autograd.grad(run_layers(mixed, x, c).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_baseline_may_replace_another():
    model = make_model("dit")
    for method in ("checkpointed", "stock"):
        use_baseline(model, method)
    assert all(layer.run is stock_layer for layer in model.layers)


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("eager", 1.0, "one of stock, checkpointed, selective, compiled, got eager"),
        ("compiled", 1.5, "budget must be from 0 to 1, got 1.5"),
        ("compiled", -0.5, "budget must be from 0 to 1, got -0.5"),
        ("checkpointed", 0.5, "budget must be 1 for checkpointed, got 0.5"),
    ],
)
def test_rejects(method, budget, message):
    model = make_model("dit")
    with pytest.raises(ValueError, match=message):
        use_baseline(model, method, budget=budget)
    assert all(layer.run is None for layer in model.layers)
