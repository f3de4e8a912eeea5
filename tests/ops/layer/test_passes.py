import pytest
import torch
from ops.one_layer import EVERY_POLICY, OneLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.memory.measure import measure_peak
from dbkernels.ops import POLICIES
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import branches as mlp_module
from dbkernels.ops.layer import passes as layer_module
from dbkernels.ops.layer.passes import Kept, LayerCall
from dbkernels.ops.layer.projection import Gradients
from dbkernels.ops.layer.tensors import Activations, LayerOptions, LayerWeights

B, T, D, H = 2, 5, 24, 3
WANTED = frozenset(LayerWeights._fields)


def layer_call(recompute="none", samples=B, tokens=None, **options):
    layer = OneLayer(samples, T, D, H, **options)
    norm = NormOptions(1e-6, True, layer.weights.qkv_weight.dtype)
    told = LayerOptions(H, layer.options["mlp"], norm, recompute, tokens)
    x, modulation = layer.tensors["x"], layer.tensors["modulation"].flatten(0, -2)
    return LayerCall(x, modulation, layer.options["rotary"], layer.weights, told)


def kept_by(call, activations):
    keeps = POLICIES[call.options.recompute].keeps
    return Activations(*(t if n in keeps else None for n, t in activations._asdict().items()))


def backward(call, kept, *, owned=False):
    """Every gradient, by name."""
    gradients = Gradients(WANTED, call.weights.qkv_weight.dtype)
    dout = call.x[:, : call.options.num_queries].cos()
    dx, dmodulation = call.backward(dout, Kept(kept._asdict(), owned=owned), gradients)
    return {"x": dx, "modulation": dmodulation, **gradients.sums}


def test_activations_have_the_shapes_and_dtypes_that_they_say():
    call = layer_call(mlp="swiglu", per_token=True, dtypes=(torch.float32, *[torch.bfloat16] * 2))
    out, activations = call.forward()
    f32, bf16 = torch.float32, torch.bfloat16
    assert (out.shape, out.dtype) == ((B, T, D), f32) and activations.q is None
    assert shapes_and_dtypes(activations) == {
        "stats1": ((B * T, 1, 2), f32),
        "qkv": ((B, T, 3 * D), bf16),
        "attended": ((B, T, D), bf16),
        "logsumexp": ((B, H, T), f32),
        "a": ((B, T, D), bf16),
        "stats2": ((B * T, 1, 2), f32),
        "hidden": ((B * T, 80), bf16),
        "m": ((B, T, D), bf16),
    }


def test_activations_of_the_first_tokens_alone_are_those_and_keys_and_values():
    dtypes, N = (torch.float32, *[torch.bfloat16] * 2), 3
    call = layer_call(mlp="swiglu", per_token=True, tokens=N, dtypes=dtypes)
    out, activations = call.forward()
    f32, bf16 = torch.float32, torch.bfloat16
    assert (out.shape, out.dtype) == ((B, N, D), f32)
    assert shapes_and_dtypes(activations) == {
        "stats1": ((B * T, 1, 2), f32),
        "q": ((B, N, D), bf16),
        "qkv": ((B, T, 2 * D), bf16),
        "attended": ((B, N, D), bf16),
        "logsumexp": ((B, H, N), f32),
        "a": ((B, N, D), bf16),
        "stats2": ((B * N, 1, 2), f32),
        "hidden": ((B * N, 80), bf16),
        "m": ((B, N, D), bf16),
    }


def shapes_and_dtypes(activations):
    there = {name: t for name, t in activations._asdict().items() if t is not None}
    return {name: (tuple(t.shape), t.dtype) for name, t in there.items()}


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_first_tokens_are_a_call_of_their_own_with_their_conditions(tokens):
    for per_token in (False, True):
        call = layer_call(tokens=tokens, per_token=per_token)
        first = call.first()
        assert torch.equal(first.x, call.x[:, :tokens]) and first.x.is_contiguous()
        each = call.modulation.view(B, -1, 6 * D)[:, :tokens].flatten(0, 1)
        assert torch.equal(first.modulation, each)
        assert layer_call(per_token=per_token).first().x.shape == (B, T, D)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_hidden_is_made_only_for_a_policy_that_keeps_it(recompute):
    _, activations = layer_call(recompute).forward()
    assert (activations.hidden is not None) == ("hidden" in POLICIES[recompute].keeps)
    others = [t is not None for n, t in activations._asdict().items() if n not in ("q", "hidden")]
    assert set(others) == {bool(POLICIES[recompute].keeps)}


def test_tokens_are_grouped_by_the_sample_whose_condition_they_share():
    x = torch.arange(B * T * D).view(B, T, D)
    assert layer_call().by_sample(x).shape == (B, T, D)
    each = layer_call(per_token=True).by_sample(x)
    assert each.shape == (B * T, 1, D) and torch.equal(each[7, 0], x[1, 2])


@pytest.mark.parametrize("options", [{"qk_norm": False}, {"qk_norm": True, "rotated": True}])
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_owned_activations_are_written_over_and_the_gradients_are_the_same(recompute, options):
    call = layer_call(recompute, **options)
    _, activations = call.forward()
    kept = kept_by(call, activations)
    before = {n: t.clone() for n, t in kept._asdict().items() if t is not None}
    expected = backward(call, kept)
    assert all(torch.equal(getattr(kept, n), t) for n, t in before.items())
    for name, grad in backward(call, kept, owned=True).items():
        assert torch.equal(grad, expected[name]), name
    changed = {n for n, t in before.items() if not torch.equal(getattr(kept, n), t)}
    reusable = {"a", "m", "hidden"} | (set() if options["qk_norm"] else {"qkv"})
    assert changed == reusable & POLICIES[recompute].keeps


def test_whoever_else_saved_what_is_written_over_gets_an_error():
    saved, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    y = (saved * weight).sum()
    assert Kept({}, owned=False).buffer(saved).data_ptr() != saved.data_ptr()
    y.backward(retain_graph=True)
    assert Kept({}, owned=True).buffer(saved) is saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_is_owned_lowers_the_peak():
    def peak(recompute, owned):
        call = layer_call(recompute, qk_norm=False)
        kept = kept_by(call, call.forward()[1])
        return measure_peak(
            lambda: backward(call, kept, owned=owned), model=nn.Module(), inputs=[call.x]
        ).total_bytes

    hidden_bytes = B * T * 40 * 4
    assert peak("none", owned=True) <= peak("none", owned=False) - hidden_bytes
    # what was computed again has no other owner, whoever retains the graph
    assert peak("layer", owned=True) == peak("layer", owned=False)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_small_chunks_change_rounding_only(mlp, recompute, monkeypatch):
    call = layer_call(recompute, mlp=mlp, dtypes=(torch.float64,) * 3)
    whole, activations = call.forward()
    expected = backward(call, kept_by(call, activations))
    monkeypatch.setattr(mlp_module, "CHUNK", 3)  # the last of four has one token
    out, activations = call.forward()
    torch.testing.assert_close(out, whole)
    for name, grad in backward(call, kept_by(call, activations), owned=True).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize(
    "options",
    [
        {"per_token": True},
        {"qk_norm": True, "rotated": True},
        {"per_token": True, "tokens": 3},
        {"qk_norm": True, "rotated": True, "tokens": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["qkv", "layer"])
@pytest.mark.parametrize("part", [2 * T, 1])
def test_a_few_samples_at_a_time_change_rounding_only(part, recompute, options, monkeypatch):
    call = layer_call(recompute, samples=5, dtypes=(torch.float64,) * 3, **options)
    whole, activations = call.forward()
    expected = backward(call, kept_by(call, activations))
    monkeypatch.setattr(layer_module, "PART", part)
    out, activations = call.forward()
    torch.testing.assert_close(out, whole)
    for owned in (False, True):
        for name, grad in backward(call, kept_by(call, activations), owned=owned).items():
            torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("tokens", [None, 2])
@pytest.mark.parametrize("recompute", ["qkv", "layer"])
def test_weights_gradients_of_parts_add_up_in_float32(recompute, tokens, monkeypatch):
    call = layer_call(recompute, samples=6, tokens=tokens, dtypes=(torch.bfloat16,) * 3)
    monkeypatch.setattr(layer_module, "PART", 1)
    grads = backward(call, kept_by(call, call.forward()[1]), owned=True)
    for name in WANTED - {"q_weight", "k_weight"}:
        assert grads[name].dtype == torch.float32, name
    assert grads["x"].dtype == grads["modulation"].dtype == torch.bfloat16


@pytest.mark.parametrize("recompute", ["qkv", "layer"])
def test_weights_gradients_of_parts_are_not_rounded_before_they_add_up(recompute, monkeypatch):
    call = layer_call(recompute, dtypes=(torch.bfloat16,) * 3)
    monkeypatch.setattr(layer_module, "PART", 1)
    grads = backward(call, kept_by(call, call.forward()[1]))
    alone = [
        backward(part, kept_by(part, part.forward()[1])) for _, part in call._parts(call.x.dtype, 1)
    ]
    for name in ("qkv_weight", "out_weight", "fc1_weight", "fc2_weight"):
        rounded = sum(part[name].float() for part in alone)
        torch.testing.assert_close(grads[name], rounded, rtol=0.05, atol=0.05)
        assert not torch.equal(grads[name], rounded), name


def test_a_few_samples_at_a_time_lower_the_peak(monkeypatch):
    def peak(recompute):
        call = layer_call(recompute, samples=8)

        def step():
            backward(call, kept_by(call, call.forward()[1]), owned=True)

        return measure_peak(step, model=nn.Module(), inputs=[call.x]).total_bytes

    whole = {recompute: peak(recompute) for recompute in ("qkv", "layer")}
    monkeypatch.setattr(layer_module, "PART", 2 * T)
    monkeypatch.setattr(mlp_module, "CHUNK", 2 * T)
    assert peak("layer") < 0.7 * whole["layer"] and peak("qkv") < 0.9 * whole["qkv"]


@pytest.mark.parametrize("tokens", [None, 2])
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_inputs_are_left_alone(recompute, tokens):
    call = layer_call(recompute, qk_norm=False, tokens=tokens)
    inputs = [call.x, call.modulation, *(w for w in call.weights if w is not None)]
    before = [t.clone() for t in inputs]
    _, activations = call.forward()
    backward(call, kept_by(call, activations), owned=True)
    assert all(map(torch.equal, inputs, before))


# a GPU's kernels cannot run here, but what they are given and return has shapes: meta tensors go
# the way of a GPU's, and unlike fake ones can be written by `out=` without one
@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_shapes_without_data(recompute, dtype, tokens):
    B, T, D, H = 2, 5, 32, 4
    with torch.device("meta"):
        shapes = [(3 * D, D), 3 * D, (D, D), D, (80, D), 80, (D, 80), D, D // H, D // H]
        weights = LayerWeights(*(torch.empty(shape, dtype=dtype) for shape in shapes))
        options = LayerOptions(H, "gelu", NormOptions(1e-6, True, dtype), recompute, tokens)
        x, modulation = torch.empty(B, T, D), torch.empty(B, 6 * D)
        call = LayerCall(x, modulation, torch.empty(2, T, D // H), weights, options)
        out, activations = call.forward()
        kept = kept_by(call, activations)
        assert kept.qkv is None or kept.qkv.dtype == dtype
        grads = backward(call, kept, owned=True)
        assert out.shape == (B, tokens or T, D)
        expected = {"out": out, "x": x, "modulation": modulation, **weights._asdict()}
        for name, tensor in {"out": out, **grads}.items():
            assert tensor.shape == expected[name].shape, name
            assert tensor.device.type == "meta", name
        assert out.dtype == grads["x"].dtype == grads["modulation"].dtype == torch.float32


@pytest.mark.parametrize(
    ("recompute", "tokens"), [("qkv", 8192), ("layer", 4096), ("none", 5 * 4096)]
)
def test_a_gpu_makes_again_as_many_tokens_at_once_as_leave_the_peak_where_it_is(recompute, tokens):
    class Parts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.tokens = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.dbkernels.adaln_norm_bwd.default:
                self.tokens.append(args[0].shape[0] * args[0].shape[1])
            return func(*args, **(kwargs or {}))

    call = layer_call(recompute)
    samples, each = 5, 4096
    with FakeTensorMode(allow_non_fake_inputs=True), dry_run_on_gpu(132), Parts() as parts:
        x, modulation = torch.empty(samples, each, D), torch.empty(samples, 6 * D)
        call = call._replace(x=x, modulation=modulation, rotary=None)
        _, activations = call.forward()
        backward(call, kept_by(call, activations))
    assert parts.tokens[0] == tokens and sum(parts.tokens) == samples * each
