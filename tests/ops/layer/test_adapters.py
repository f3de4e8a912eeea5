"""Adapters of low rank in a layer: what they compute, and what they neither keep nor make."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.kinds import LAYERS
from ops.one_layer import (
    EVERY_POLICY,
    KINDS,
    SCALE,
    TARGETS,
    OneLayer,
    Ops,
    assert_close,
    assert_same_bits,
    gradients,
    saved_bytes,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import Adapter, LayerWeights, adaln_layer, linear, reference
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import passes
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import Linear
from dbkernels.ops.layer.mlp import _has_epilogue

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
EVERY_TARGET = tuple(TARGETS)


def merged(weight, adapters):
    """W + s B A, which no op forms."""
    rows = [torch.zeros_like(weight)[: a.start] for a in adapters]
    for before, a in zip(rows, adapters, strict=True):
        after = weight.new_zeros(len(weight) - a.stop, weight.shape[1])
        weight = weight + torch.cat([before, a.scale * a.up @ a.down, after])
    return weight


def whole(given):
    """Weights that their adapters are in; anything else as it is."""
    if not isinstance(given, LayerWeights):
        return given
    of = {name: [a for a in given.adapters if a.projection == name] for name in EVERY_TARGET}
    full = {
        f"{name}_weight": merged(getattr(given, f"{name}_weight"), adapters)
        for name, adapters in of.items()
        if adapters
    }
    return given._replace(**full, adapters=())


def on_merged(specification, *given, **options):
    """A specification of a layer whose adapters are in its weights."""
    return specification(*map(whole, given), **{n: whole(told) for n, told in options.items()})


def exact(layer, **options):
    tensors = {name: t.double() for name, t in layer.tensors.items()}
    return layer.with_grads(partial(on_merged, layer.specification), tensors=tensors, **options)


@pytest.mark.parametrize(
    ("targets", "asked"),
    [
        *(((target,), {}) for target in TARGETS),
        *((("q", "v", "fc1"), kind) for kind in [*KINDS, {"num_queries": 2}]),
        (EVERY_TARGET, {}),
        (EVERY_TARGET, {"num_queries": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_agrees_with_weights_that_they_are_in_at_every_policy(targets, asked, mlp):
    # heads narrower together than the stream, and qkv's outputs in other thirds than its inputs
    options = {"mlp": mlp, "rotated": True, "head_dim": 6, "dtypes": (F64,) * 3}
    layer = OneLayer(**options, adapters=targets, rank=3)
    expected = exact(layer, **asked)
    for recompute in EVERY_POLICY:
        assert_close(layer.with_grads(recompute=recompute, **asked), expected, 1e-12)


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), EVERY_TARGET], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_has_them(kind, targets):
    layer = LAYERS[kind](mlp="swiglu", head_dim=6, dtypes=(F64,) * 3, adapters=targets, rank=3)
    for recompute in EVERY_POLICY:
        assert_close(layer.with_grads(recompute=recompute), exact(layer), 1e-12)
    eager = layer.with_grads(layer.specification)
    assert_close(eager, exact(layer), 1e-12)


@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("recompute", ["mlp", "qkv", "layer"])
def test_parts_of_samples_and_chunks_of_tokens_agree_too(recompute, num_queries, monkeypatch):
    monkeypatch.setattr(passes, "PART", 10)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", 3)
    layer = OneLayer(5, bias=False, dtypes=(F64,) * 3, adapters=EVERY_TARGET)
    asked = {"num_queries": num_queries}
    assert_close(layer.with_grads(recompute=recompute, **asked), exact(layer, **asked), 1e-12)


# the third is a base in bfloat16 whose adapters are not
@pytest.mark.parametrize("num_queries", [None, 19])
@pytest.mark.parametrize(
    ("dtypes", "adapter_dtype"),
    [((F32,) * 3, F32), ((BF16,) * 3, BF16), ((F32, BF16, BF16), F32), ((torch.float16,) * 3, F32)],
    ids=str,
)
def test_as_accurate_as_eager_at_every_policy(dtypes, adapter_dtype, num_queries):
    options = {"dtypes": dtypes, "adapter_dtype": adapter_dtype, "adapters": EVERY_TARGET}
    layer, told = OneLayer(3, 37, 128, 1, hidden=160, **options), {"num_queries": num_queries}
    first, *others = (layer.with_grads(recompute=r, **told) for r in EVERY_POLICY)
    for result in others[: None if dtypes[0] == dtypes[2] else -1]:
        assert_same_bits(result, first)
    assert first["q_down"].dtype == adapter_dtype
    eager = layer.with_grads(layer.specification, **told)
    expected = exact(layer, **told)
    for name in first.keys() - {"q_weight", "k_weight"}:
        assert_as_accurate_as_eager(name, first[name], eager[name], expected[name])


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("num_queries", [None, 3])
def test_a_frozen_base_has_no_gradient_and_that_of_adapters_stays(recompute, num_queries):
    layer = OneLayer(dtypes=(F64,) * 3, adapters=EVERY_TARGET)
    told = {"recompute": recompute, "num_queries": num_queries}
    leaves, whole = layer.leaves(), layer.with_grads(**told)
    for name in leaves.keys() & set(LayerWeights._fields):
        leaves[name].requires_grad_(False)
    out = layer.run(leaves, **told)
    dout = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    with Ops() as ops:
        grads = gradients(out, leaves, dout)
    assert_same_bits(grads, {name: whole[name] for name in grads})
    calls = [shapes for name, shapes in ops.calls if name in ("mm", "addmm", "addmm_")]
    products = [(left[0], right[1]) for *_, left, right in calls]
    weights = {tuple(leaves[f"{name}_weight"].shape) for name in ("qkv", "out", "fc1", "fc2")}
    assert products and not weights & set(products)


class Made(Ops):
    """Numbers of each tensor that is made, by storage."""

    def __init__(self):
        super().__init__()
        self.sizes, self.seen = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        known = {t.untyped_storage()._cdata for t in self.seen}
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                self.seen.append(t)
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_keeps_nothing_and_makes_nothing_wider_than_its_rank(recompute):
    def made_and_kept(adapters):
        layer = OneLayer(4, 50, adapters=adapters, bias=False)
        leaves = layer.leaves()
        for name in LayerWeights._fields[:-1]:
            if name in leaves:
                leaves[name].requires_grad_(False)
        with Made() as step:
            out = layer.run(leaves, recompute=recompute)
            gradients(out, leaves, torch.ones_like(out))
        wide = 4 * 50 * 2  # of every token as many numbers as the rank
        made = sorted(size for size in step.sizes if size > wide)
        kept = saved_bytes(lambda: layer.run(leaves, recompute=recompute), but=leaves.values())
        return made, kept

    assert made_and_kept(EVERY_TARGET) == made_and_kept(())


def test_their_gradients_are_float32_sums_whatever_the_branches_run_in():
    x, dy = torch.randn(5, 6).to(BF16), torch.randn(5, 4).to(BF16)
    adapter = Adapter("fc", torch.randn(2, 6).to(BF16), torch.randn(4, 2).to(BF16), SCALE)
    grads = Gradients(frozenset({"fc_down0", "fc_up0"}), BF16, [adapter])
    for _ in range(2):
        grads.add_weight("fc", dy, x)
    z, dz = adapter.narrow(x).float(), adapter.narrow_back(dy).float()
    torch.testing.assert_close(grads.sums["fc_up0"], 2 * dy.float().T @ z)
    torch.testing.assert_close(grads.sums["fc_down0"], 2 * dz.T @ x.float())


def test_a_gpu_takes_gelu_after_what_adapters_add():
    with FakeTensorMode(), dry_run_on_gpu(132):
        rows, weight, bias = (torch.empty(*s, dtype=BF16) for s in ((5, 6), (4, 6), (4,)))
        adapter = Adapter("fc1", weight[:2], weight[:, :2])
        assert _has_epilogue(rows, "gelu", Linear(weight, bias))
        assert not _has_epilogue(rows, "gelu", Linear(weight, bias, (adapter,)))


def test_compiles_without_graph_breaks():
    layer = OneLayer(adapters=("q", "fc1"))
    compiled = torch.compile(adaln_layer, backend="aot_eager", fullgraph=True)
    assert_close(layer.with_grads(compiled), layer.with_grads(), 1e-5)


def condition_tensors(dtype, adapter_dtype):
    shapes = (2, 3, 7), (12, 7), (12,), (2, 7), (12, 2), (3, 7), (4, 3)
    dtypes = [dtype] * 3 + [adapter_dtype] * 4
    return [torch.randn(s, dtype=F64).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def condition_adapters(tensors):
    return [Adapter("linear", *tensors[:2], SCALE), Adapter("linear", *tensors[2:], 2.0, 5)]


def of_condition(x, weight, bias, *tensors):
    return linear(x, weight, bias, condition_adapters(tensors))


def in_eager(x, weight, bias, *tensors):
    return reference.projected(x, Linear(weight, bias, tuple(condition_adapters(tensors))))


def in_weight(x, weight, bias, *tensors):
    weight = merged(weight, condition_adapters(tensors))
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize(
    ("dtype", "small"), [(F64, F64), (F32, F32), (BF16, BF16), (BF16, F32)], ids=str
)
def test_the_map_of_a_condition_has_them_too(dtype, small):
    tensors = condition_tensors(dtype, small)
    results = with_grads(of_condition, *tensors), with_grads(in_eager, *tensors)
    expected = with_grads(in_weight, *(t.double() for t in tensors))
    for place, values in enumerate(zip(*results, expected, strict=True)):
        if dtype == F64:
            torch.testing.assert_close(values[0], values[2], rtol=1e-12, atol=1e-12)
        assert_as_accurate_as_eager(f"result {place}", *values)
        assert values[0].dtype == [dtype, *(t.dtype for t in tensors)][place]


@pytest.mark.parametrize("wanted", range(7))
def test_the_map_of_a_condition_gives_a_gradient_to_what_wants_one(wanted):
    tensors = condition_tensors(F64, F64)
    whole = with_grads(of_condition, *tensors)
    tensors[wanted].requires_grad_()
    out = of_condition(*tensors)
    dout = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    out.backward(dout)
    assert [t.grad is not None for t in tensors] == [place == wanted for place in range(7)]
    torch.testing.assert_close(tensors[wanted].grad, whole[1 + wanted])


SMALL = torch.zeros(2, 24), torch.zeros(72, 2)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter("gate", *SMALL), "projection of an adapter must be one of qkv, out, fc1, fc2"),
        (Adapter("out", *SMALL), "out's adapter must be added to some of outputs 0 to 24, got 0"),
        (Adapter("qkv", *SMALL, start=1), "outputs 0 to 72, got 1 to 73"),
        (Adapter("qkv", *SMALL, start=-1), "outputs 0 to 72, got -1 to 71"),
        (Adapter("fc2", *SMALL), r"down of fc2's adapter must be .* = \(r, 40\), got \(2, 24\)"),
        (Adapter("qkv", SMALL[0][:0], SMALL[1][:, :0]), r"\(r, 24\), got \(0, 24\)"),
        (Adapter("qkv", SMALL[0][0], SMALL[1]), r"\(r, 24\), got \(24,\)"),
        (Adapter("qkv", SMALL[0], SMALL[1].T), r"up of .* \(outputs, r\) = \(.., 2\), got \(2, 72"),
        (Adapter("qkv", SMALL[0].int(), SMALL[1]), "qkv_down0 must be one of .* got torch.int32"),
        (Adapter("qkv", SMALL[0], SMALL[1].to("meta")), "must be on one device, got"),
    ],
)
def test_rejects(adapter, message):
    layer = OneLayer()
    weights = layer.weights._replace(adapters=(adapter,))
    with pytest.raises(ValueError, match=message):
        adaln_layer(layer.tensors["x"], layer.tensors["modulation"], weights, num_heads=3)


def test_the_map_of_a_condition_rejects_an_adapter_that_does_not_fit():
    x, weight = torch.zeros(3, 24), torch.zeros(71, 24)
    for name, message in (("qkv", "must be one of linear, got qkv"), ("linear", "outputs 0 to 71")):
        with pytest.raises(ValueError, match=message):
            linear(x, weight, None, [Adapter(name, *SMALL)])
