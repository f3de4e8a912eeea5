"""Adapters on a model: nothing changes at first, they alone are trained, and they can be merged."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from models.tiny import DRAW, SCALE, every_family, levels_of, make_batch, make_model, randomise
from ops.one_layer import EVERY_POLICY
from torch import nn

from dbkernels.models import (
    AdaLNLayer,
    LayerConfig,
    add_adapters,
    merge_adapters,
    remove_adapters,
)
from dbkernels.models.adapter import TARGETS, adapters_in
from dbkernels.models.baseline import use_baseline
from dbkernels.models.cached import cached_layer
from dbkernels.models.cross_layer import CrossConfig, CrossLayer
from dbkernels.models.joint_layer import JointConfig, JointLayer
from dbkernels.models.layer import run_layers
from dbkernels.models.parallel_layer import ParallelConfig, ParallelLayer
from dbkernels.models.rotary import rotary_table

F64 = torch.float64
SPLIT = ("q", "k", "v", "out", "fc1", "fc2", "modulation")
MERGED = ("qkv", "fc2")
SIZES = {"dim": 12, "num_heads": 3, "mlp_hidden": 20, "cond_dim": 7, "qk_norm": True}
OF_BRANCHES = [target for target in TARGETS if not target.startswith("cross_")]
CONTEXT = torch.linspace(-1, 2, 108, dtype=F64).cos().view(3, 4, 9)
X, C = torch.linspace(1, 3, 180, dtype=F64).view(3, 5, 12), torch.randn(3, 5, 7, dtype=F64)


def trained(model, targets=SPLIT, **options):
    """With adapters that do something."""
    add_adapters(model, rank=2, alpha=3.0, targets=targets, **options)
    for _, adapter in adapters_in(model):
        randomise(adapter)
    return model


def make_layer(**options):
    return randomise(AdaLNLayer(LayerConfig(**SIZES, **options))).double()


def make_parallel(**options):
    return randomise(ParallelLayer(ParallelConfig(**SIZES, **options))).double()


def make_cross(**options):
    return randomise(CrossLayer(CrossConfig(**SIZES, context_dim=9, **options))).double()


def merged(model):
    other = copy.deepcopy(model)
    merge_adapters(other)
    return other


def grads_of(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_plain_torch(model):
    other = copy.deepcopy(model)
    use_baseline(other, "stock")
    return other


@every_family
@pytest.mark.parametrize("targets", [SPLIT, MERGED], ids=str)
def test_a_family_computes_what_it_does_with_merged_weights(family, targets):
    model = make_model(family)
    level, interval = levels_of(model)

    def loss(model):
        return model.loss(DRAW, level, SCALE, (0, 1, 2), make_batch(model), interval)

    before = loss(model)
    add_adapters(model, rank=2, targets=targets)
    assert torch.equal(loss(model), before)
    remove_adapters(model)
    trained(model, targets)
    assert abs(loss(model) - before) > 1e-4 * before.abs()
    for other in (merged(model), in_plain_torch(model)):
        torch.testing.assert_close(loss(model), loss(other), rtol=1e-5, atol=1e-6)
    found, expected = grads_of(model, loss), grads_of(in_plain_torch(model), loss)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() == wanted
    streams = 1 + (family == "mmdit")  # of some of its layers
    assert 2 * 3 * len(targets) <= len(wanted) <= 2 * 3 * len(targets) * streams
    assert all(".adapters." in name for name in wanted)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("make", "target"), [
    *((make, target) for make in (make_layer, make_parallel) for target in OF_BRANCHES),
    *((make_cross, target) for target in TARGETS),
])  # fmt: skip
@pytest.mark.parametrize("c", [C, C[:, 0]], ids=["of tokens", "of samples"])
def test_a_layer_has_each_at_every_policy(make, c, target):
    model = trained(make(), [target])
    more = (CONTEXT, torch.tensor([4, 0, 2])) if make is make_cross else ()
    expected = merged(model)(X, c, *more)
    with torch.no_grad():
        model.run = None
        projected = model.modulation(torch.nn.functional.silu(c))
        reference = model.specified(X, projected, *more, None)
        torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)
    first = None
    for recompute in EVERY_POLICY:
        model.config = replace(model.config, recompute=recompute)
        torch.testing.assert_close(model(X, c, *more), expected, rtol=1e-12, atol=1e-12)
        found = grads_of(model, lambda model: model(X, c, *more).square().sum())
        assert len(found) == 2
        first = first or found
        for name, grad in found.items():
            assert grad.count_nonzero()
            torch.testing.assert_close(grad, first[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"dual_attention": True}, {"context_pre_only": True}])
@pytest.mark.parametrize("targets", [SPLIT, MERGED], ids=str)
def test_a_layer_of_two_streams_has_them_in_each(options, targets):
    model = randomise(JointLayer(JointConfig(**SIZES, **options))).double()
    trained(model, targets)
    parts = {}
    for place, _ in adapters_in(model):
        parts.setdefault(place.part, set()).add(place.target)
    of_keys = {"k", "v", "qkv", "modulation"} if options.get("context_pre_only") else set(targets)
    expected = {"x": set(targets), "context": set(targets) & of_keys}
    if options.get("dual_attention"):
        expected["second"] = set(targets) - {"fc1", "fc2", "modulation"}
    assert parts == expected
    given = X, X[:, :4].flip(-1), C[:, 0]

    def results(model):
        return [t for t in model(*given) if t is not None]

    def loss(model):
        return sum((t * t.detach().cos()).sum() for t in results(model))

    stock = copy.deepcopy(model)
    stock.run = JointLayer.stock
    for recompute in EVERY_POLICY:
        model.config = replace(model.config, recompute=recompute)
        for other in (merged(model), stock):
            for found, expected in zip(results(model), results(other), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found, expected = grads_of(model, loss), grads_of(stock, loss)
        assert found.keys() == expected.keys() and len(found) == 2 * sum(map(len, parts.values()))
        for name, grad in found.items():
            assert grad.count_nonzero(), name
            torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-11)


def test_starts_as_the_libraries_do_and_freezes_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(make_layer().float(), nn.Linear(3, 3), make_parallel().bfloat16())
    names = set(model.state_dict())
    add_adapters(model, rank=3, targets=("v", "fc2"), layers=[1])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"2.{place}.{kind}"
        for place in ("attention.qkv.adapters.v", "mlp.fc2.adapters.fc2")
        for kind in ("down", "up")
    }
    (place, v), (_, fc2) = adapters_in(model)
    assert place.name == "v of 2" and v.alpha == v.rank == 3 and v.start == 24
    assert v.down.dtype == torch.float32 and v.down.shape == (3, 12) and v.up.shape == (12, 3)
    assert not v.up.any() and 0.8 * 12**-0.5 < v.down.abs().max() <= 12**-0.5
    assert 0.8 * 20**-0.5 < fc2.down.abs().max() <= 20**-0.5
    remove_adapters(model)
    assert set(model.state_dict()) == names and not list(adapters_in(model))
    with pytest.raises(ValueError, match="model must have adapters, got a Sequential without any"):
        remove_adapters(model)


def test_a_copy_and_a_state_dict_have_them_too():
    model = trained(make_layer())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X, C), model(X, C))
    other = make_layer()
    add_adapters(other, rank=2, alpha=3.0, targets=SPLIT)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X, C), model(X, C))


def test_a_merged_weight_is_rounded_once():
    model = trained(make_layer().bfloat16(), ["k"])
    (_, adapter), weight = next(adapters_in(model)), model.attention.qkv.weight.detach().clone()
    expected = weight.clone()
    expected[12:24] = (weight[12:24].float() + 1.5 * adapter.up @ adapter.down).bfloat16()
    merge_adapters(model)
    assert torch.equal(model.attention.qkv.weight, expected)
    assert not torch.equal(expected[12:24], weight[12:24])


def test_cached_rows_have_them():
    model = trained(make_layer(norm="rms", mlp="swiglu"))
    rotary, modulation = rotary_table(torch.arange(5), 4), model.modulation(C.sigmoid() * C)
    with torch.no_grad():
        expected = run_layers([model], X, C, rotary, attention="causal")
        cache = torch.zeros(2, 3, 3, 5, 4, dtype=F64)
        found = cached_layer(model, X, model.modulated(modulation), rotary, cache, first=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_exported_layer_has_them():
    model = trained(make_layer())
    found = torch.export.export(model, (X, C)).module()(X, C)
    torch.testing.assert_close(found, model(X, C), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adapter: adapter.register_forward_hook(print), "forward hooks"),
        (lambda adapter: setattr(adapter, "alpha", 5.0), "alpha 5.0 in place of 3.0"),
        (lambda adapter: adapter.register_parameter("gate", nn.Parameter(X)), "parameter gate"),
    ],
)
def test_a_change_to_one_is_refused_as_to_any_module_inside(change, message):
    model = trained(make_layer())
    change(model.attention.qkv.adapters["q"])
    with pytest.raises(RuntimeError, match=f"attention.qkv.adapters.q must be .*{message}"):
        model(X, C)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_a_base_of_8_bits_is_widened_where_it_is_used_and_not_kept(recompute):
    quantization = pytest.importorskip("torchao.quantization")
    model = trained(make_layer(recompute=recompute).float())
    x, c = X.float().requires_grad_(), C[:, 0].float()
    wide = copy.deepcopy(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for (name, narrow), (_, other) in zip(model.named_modules(), wide.named_modules(), strict=True):
        if isinstance(narrow, nn.Linear):
            assert type(narrow.weight.data) is not torch.Tensor, name
            other.weight.data.copy_(narrow.weight.dequantize())
    assert torch.equal(model(x, c), wide(x, c))
    found, expected = (grads_of(m, lambda m: m(x, c).square().sum()) for m in (model, wide))
    assert found.keys() == expected.keys() and len(found) == 2 * len(SPLIT)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x, c)
    weights = {m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)}
    assert kept and not any(type(t) is torch.Tensor and t.shape in weights for t in kept)
    with pytest.raises(ValueError, match="weight of q must be of floating point, got 8 bits"):
        merge_adapters(model)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(3, 3), {}, "must have a layer of this package, got a Linear without any"),
        (make_layer(), {"rank": 0}, "rank must be at least 1, got 0"),
        (make_layer(), {"rank": 13}, "rank must be at most 12, the width of q, got 13"),
        (make_layer(), {"rank": 8, "targets": ["modulation"]}, "at most 7, the width of modulat"),
        (make_layer(), {"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
        (make_layer(), {"alpha": float("nan")}, "alpha must be a finite number above 0, got nan"),
        (make_layer(), {"targets": ["q", "to_q"]}, "target must be one of q, k, v, qkv, .* got to"),
        (make_layer(), {"targets": []}, r"targets must be some of q, .*, got \[\]"),
        (make_layer(), {"targets": "qkv"}, "targets must be some of q, .*, got 'qkv'"),
        (make_layer(), {"targets": ["q", "q"]}, "targets must name each once, got q again"),
        (make_layer(), {"targets": ["v", "qkv", "k"]}, "both qkv and a part of it, got k"),
        (make_layer(), {"layers": [1]}, "layers must be 0 to 0, got 1"),
        (make_layer(), {"layers": []}, r"layers must be some .* each once, got \[\]"),
        (make_layer(), {"layers": [0, 0]}, r"layers must be some .* each once, got \[0, 0\]"),
        (
            make_layer(),
            {"targets": ["q", "cross_q"]},
            "target of these layers must be .*, got cross_q",
        ),
        (trained(make_layer()), {}, "must have no adapters yet, got q: remove them first"),
    ],
)
def test_rejects(model, options, message):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        add_adapters(model, **{"rank": 2, **options})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_rejects_a_layer_that_is_not_as_it_was_made():
    model = make_layer()
    model.mlp.fc1 = nn.Sequential(model.mlp.fc1)
    with pytest.raises(ValueError, match=r"mlp.fc1 must be a plain Linear as it was made, got a S"):
        add_adapters(model, rank=2, targets=["q"])
    assert all(p.requires_grad for p in model.parameters())
