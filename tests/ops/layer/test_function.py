import pytest
import torch
from ops.one_layer import ALL_OPTIONS, EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits

from dbkernels.ops import adaln_layer, reference, use_implementation

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# x, modulation, weights: the third is a model in bfloat16 whose stream is not, the fourth one whose
# norms have weights of their own, which `fold_affine` leaves in float32
DTYPES = [(F32,) * 3, (BF16,) * 3, (F32, BF16, BF16), (BF16, F32, BF16), (F16,) * 3]
# every two choices of any two options meet in one of these
SOME_OPTIONS = [ALL_OPTIONS[i] for i in (0, 9, 22, 27, 36, 45, 50, 63)]
EVERYTHING = {"mlp": "swiglu", "rotated": True, "per_token": True}


def describe(value):
    if isinstance(value, dict):
        return "-".join(name if on is True else str(on) for name, on in value.items() if on)
    return "-".join(str(dtype).removeprefix("torch.") for dtype in value)


@pytest.mark.parametrize("dtypes", DTYPES, ids=describe)
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=describe)
def test_as_accurate_as_eager(options, dtypes):
    layer = OneLayer(3, 37, 128, 1, hidden=160, **options, dtypes=dtypes)
    results = [layer.with_grads(recompute=recompute) for recompute in EVERY_POLICY]
    for result in results:
        assert result["out"].dtype == dtypes[0]
        assert {name: result[name].dtype for name in layer.tensors} == {
            name: tensor.dtype for name, tensor in layer.tensors.items()
        }
    layer.assert_as_accurate_as_eager(*results)


@pytest.mark.parametrize(
    ("recompute", "options"),
    [
        ("none", {"qk_norm": False, "dtypes": (F32,) * 3}),
        ("mlp", {**EVERYTHING, "norm": "rms", "bias": False, "dtypes": (F32,) * 3}),
        ("qkv", {"rotated": True, "dtypes": (F32, BF16, BF16)}),
    ],
)
def test_kernels_are_as_accurate_as_eager(recompute, options):
    layer = OneLayer(2, 5, 24, 2, **options)
    with use_implementation("triton"):
        result = layer.with_grads(recompute=recompute)
    layer.assert_as_accurate_as_eager(result)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=describe)
def test_agrees_in_float64_at_every_policy(options):
    layer = OneLayer(**options, dtypes=(torch.float64,) * 3)
    exact = layer.exact()
    for recompute in EVERY_POLICY:
        for name, value in layer.with_grads(recompute=recompute).items():
            torch.testing.assert_close(
                value, exact[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_gradients_are_those_of_differences(recompute):
    layer = OneLayer(1, 2, 4, 2, hidden=3, **EVERYTHING, dtypes=(torch.float64,) * 3)
    names, values = list(layer.tensors), list(layer.leaves().values())

    def f(*values):
        return layer.run(dict(zip(names, values, strict=True)), recompute=recompute)

    torch.autograd.gradcheck(f, values)


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F32, BF16, BF16)], ids=describe)
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=describe)
def test_every_policy_that_keeps_x_as_it_is_gives_the_same_bits(options, dtypes):
    layer = OneLayer(3, 33, 48, 3, **options, dtypes=dtypes)
    expected = layer.with_grads()
    for recompute in SAME_BITS[1:]:
        assert_same_bits(layer.with_grads(recompute=recompute), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_policy_that_rounds_x_gives_the_same_bits_where_the_branches_are_no_narrower(dtype):
    layer = OneLayer(3, 33, 48, 3, dtypes=(dtype, F32, F32) if dtype is BF16 else (F32,) * 3)
    assert_same_bits(
        layer.with_grads(recompute="layer_narrow"), layer.with_grads(recompute="layer")
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_mean_of_x_that_is_large_beside_the_rest_is_not_rounded_with_it(norm):
    layer = OneLayer(3, 37, 128, 1, hidden=160, norm=norm, dtypes=(F32, BF16, BF16))
    layer.tensors["x"] = layer.tensors["x"].add(300.0 if norm == "layer" else 0.0)
    layer.assert_as_accurate_as_eager(layer.with_grads(recompute="layer_narrow"))


def test_same_bits_every_run():
    layer = OneLayer(3, 33, 48, 3, rotated=True)
    assert_same_bits(layer.with_grads(), layer.with_grads())


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_both_norms_feel_eps(norm):
    layer = OneLayer(norm=norm, dtypes=(torch.float64,) * 3)
    layer.tensors["x"] *= 0.1
    for recompute in EVERY_POLICY:
        result = layer.with_grads(recompute=recompute, eps=0.3)
        for name, expected in layer.with_grads(reference.adaln_layer, eps=0.3).items():
            torch.testing.assert_close(result[name], expected, rtol=1e-11, atol=1e-11)


def test_closed_gates_return_x():
    layer = OneLayer()
    gates = layer.tensors["modulation"].view(2, 6, 24)[:, [2, 5]]
    layer.tensors["modulation"].view(2, 6, 24)[:, [2, 5]] = torch.zeros_like(gates)
    assert torch.equal(layer.run(layer.tensors), layer.tensors["x"])


@pytest.mark.parametrize("per_token", [False, True])
def test_samples_do_not_see_each_other(per_token):
    layer = OneLayer(3, per_token=per_token)
    changed = {name: t.clone() for name, t in layer.tensors.items()}
    for name in ("x", "modulation"):
        changed[name][1] += 0.5
    before, after = layer.with_grads(), layer.with_grads(tensors=changed)
    for name in ("out", "x", "modulation"):
        torch.testing.assert_close(after[name][::2], before[name][::2])
        assert not torch.allclose(after[name][1], before[name][1])


def test_a_condition_of_the_sample_is_the_condition_of_each_token():
    layer = OneLayer(dtypes=(torch.float64,) * 3)
    expected = layer.with_grads()
    each = layer.tensors["modulation"][:, None].expand(2, 5, -1)
    result = layer.with_grads(tensors={**layer.tensors, "modulation": each})
    assert result["modulation"].shape == (2, 5, 144)
    result["modulation"] = result["modulation"].sum(1)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_empty_batch(shape, recompute, per_token):
    layer = OneLayer(*shape, rotated=True, per_token=per_token)
    result = layer.with_grads(recompute=recompute)
    assert result.pop("out").shape == layer.tensors["x"].shape
    for name, grad in result.items():
        assert torch.equal(grad, torch.zeros_like(layer.tensors[name])), name


def test_one_token():
    layer = OneLayer(1, 1, dtypes=(torch.float64,) * 3)
    exact = layer.exact()
    for name, value in layer.with_grads().items():
        torch.testing.assert_close(value, exact[name])


def strided(layout, t):
    """The same numbers in other places."""
    return {
        "transposed": lambda: t.mT.contiguous().mT,
        "columns apart": lambda: torch.stack([t, t], dim=-1)[..., 0],
        "slice of a wider one": lambda: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        "shared by samples": lambda: t[:1].expand_as(t),
    }[layout]()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "layout", ["transposed", "columns apart", "slice of a wider one", "shared by samples"]
)
@pytest.mark.parametrize("name", ["x", "modulation"])
def test_x_and_modulation_may_have_any_strides(name, layout, per_token):
    layer = OneLayer(per_token=per_token)
    layer.tensors[name] = strided(layout, layer.tensors[name])
    dense = {name: t.contiguous() for name, t in layer.tensors.items()}
    assert_same_bits(layer.with_grads(), layer.with_grads(tensors=dense))


# plain torch takes any stride, the kernels read columns that follow each other
@pytest.mark.parametrize("layout", ["transposed", "columns apart"])
def test_kernels_take_a_modulation_of_any_strides(layout):
    layer = OneLayer(2, 2, 16, 2, hidden=8, qk_norm=False)
    x, modulation = layer.tensors["x"], layer.tensors["modulation"]
    with use_implementation("triton"), torch.no_grad():
        actual = adaln_layer(x, strided(layout, modulation), layer.weights, **layer.options)
    torch.testing.assert_close(actual, layer.run(layer.tensors))


def test_without_gradients_nothing_changes_and_nothing_is_kept():
    layer = OneLayer()
    expected = layer.run(layer.leaves()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer.run(layer.leaves())
        assert y.grad_fn is None and torch.equal(y, expected)


@pytest.mark.parametrize(("backend", "recompute"), [("aot_eager", "layer"), ("inductor", "none")])
def test_compiles_without_graph_breaks(backend, recompute):
    layer = OneLayer(norm="rms", bias=False, qk_norm=False)
    compiled = torch.compile(adaln_layer, backend=backend, fullgraph=True)
    result = layer.with_grads(compiled, recompute=recompute)
    for name, expected in layer.with_grads(recompute=recompute).items():
        torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-4)


def test_rejects_an_unknown_norm():
    layer = OneLayer()
    layer.options["norm"] = "batch"
    with pytest.raises(ValueError, match="norm must be one of layer, rms, got batch"):
        layer.run(layer.tensors)
