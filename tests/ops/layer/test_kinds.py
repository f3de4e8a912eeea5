"""What every kind of layer promises: its specification, its policies and what each keeps."""

import pytest
import torch
from ops.kinds import LAYERS
from ops.one_layer import (
    EVERY_POLICY,
    SAME_BITS,
    Ops,
    assert_same_bits,
    gradients,
    in_autocast,
    saved_bytes,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import use_implementation
from dbkernels.ops.layer import passes

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
every_kind = pytest.mark.parametrize("kind", LAYERS)
# any choices of any two options meet
OPTIONS = [
    {"rotated": True, "per_token": True},
    {"rotated": True, "qk_norm": False, "mlp": "swiglu", "bias": False},
    {"norm": "rms", "mlp": "gelu_exact", "per_token": True, "bias": ("out",)},
    {"norm": "rms", "qk_norm": False, "mlp": "swiglu", "head_dim": 10, "bias": ("qkv", "fc2")},
    {"mlp": "swiglu", "per_token": True, "head_dim": 2, "bias": ("fc1",)},
    {"qk_norm": False, "mlp": "gelu_exact", "rotated": True},
]
SHARED = {"qk_norm": False, "mlp": "gelu_exact"}
EACH = {"mlp": "swiglu", "rotated": True, "per_token": True}
DTYPES = [(F32,) * 3, (BF16,) * 3, (F32, BF16, BF16), (BF16, F32, F32), (F16,) * 3]


def assert_exact(actual, exact):
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        if expected.numel():
            error, size = (actual[name] - expected).abs().max(), expected.abs().max()
            assert error <= 1e-12 * size, f"{name}: {error:.1e} of {size:.1e}"


@every_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_in_float64_at_every_policy(options, kind):
    layer = LAYERS[kind](3, 7, **options, dtypes=(F64,) * 3)
    told = {"eps": 0.1, "qk_eps": 0.3}
    exact = layer.exact(**told)
    for recompute in EVERY_POLICY:
        assert_exact(layer.with_grads(recompute=recompute, **told), exact)


@every_kind
@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize(("samples", "tokens"), [(0, 5), (2, 0), (2, 1)])
def test_one_token_or_none_agrees_too(samples, tokens, recompute, kind):
    layer = LAYERS[kind](samples, tokens, **EACH, dtypes=(F64,) * 3)
    assert_exact(layer.with_grads(recompute=recompute), layer.exact())


# parts of four samples, or of two with another stream, leave one of one; chunks of three tokens
# leave one of one or two
@every_kind
@pytest.mark.parametrize(("part", "chunk"), [(24, 3), (1, 5)])
@pytest.mark.parametrize("options", [{**EACH, "norm": "rms"}, SHARED], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_small_parts_of_samples_and_chunks_of_tokens_agree_too(
    recompute, options, part, chunk, kind, monkeypatch
):
    monkeypatch.setattr(passes, "PART", part)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", chunk)
    layer = LAYERS[kind](5, **options, dtypes=(F64,) * 3)
    assert_exact(layer.with_grads(recompute=recompute), layer.exact())


@every_kind
@pytest.mark.parametrize("options", [{"rotated": True}, EACH, SHARED], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_accurate_as_eager_and_policies_give_the_same_bits(options, dtypes, kind):
    layer = LAYERS[kind](3, 37, 128, 1, hidden=160, **options, dtypes=dtypes)
    first, *others, last = (layer.with_grads(recompute=each) for each in EVERY_POLICY)
    given = {"out": layer.tensors["x"], **layer.tensors}
    assert {name: t.dtype for name, t in first.items()} == {n: t.dtype for n, t in given.items()}
    for result in others if dtypes[0].itemsize > dtypes[2].itemsize else [*others, last]:
        assert_same_bits(result, first)
    layer.assert_as_accurate_as_eager(first, last)


@every_kind
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_mean_of_x_that_is_large_beside_the_rest_is_not_rounded_with_it(norm, kind):
    layer = LAYERS[kind](3, 37, 128, 1, hidden=160, norm=norm, dtypes=(F32, BF16, BF16))
    layer.tensors["x"] = layer.tensors["x"].add(60.0 if norm == "layer" else 0.0)
    layer.assert_as_accurate_as_eager(layer.with_grads(recompute="layer_narrow"))


@every_kind
def test_autocast_runs_the_branches_in_bfloat16_and_nothing_else(kind):
    layer = LAYERS[kind](3, 37, 128, 1, hidden=160, rotated=True)
    fused = in_autocast(layer.op)
    first, *others, last = (layer.with_grads(fused, recompute=each) for each in EVERY_POLICY)
    assert {t.dtype for t in first.values()} == {F32}
    for result in others[: len(SAME_BITS) - 1]:
        assert_same_bits(result, first)
    layer.compare([first, last], layer.with_grads(in_autocast(layer.specification)))


@every_kind
def test_kernels_are_as_accurate_as_eager(kind):
    layer = LAYERS[kind](2, 5, 24, 2, rotated=True)
    with use_implementation("triton"):
        result = layer.with_grads(recompute="qkv")
    layer.assert_as_accurate_as_eager(result)


@every_kind
@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F32, BF16, BF16)], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_keeps_the_units_that_its_docstring_counts(recompute, dtypes, kind):
    B, T, D, H = 2, 64, 192, 3
    layer = LAYERS[kind](B, T, D, H, hidden=4 * D, rotated=True, dtypes=dtypes)
    leaves = layer.leaves()
    given = [*(t for name, t in leaves.items() if name not in ("x", "context.x")), *layer.told()]
    kept = saved_bytes(lambda: layer.run(leaves, recompute=recompute), but=given)
    x_dtype, _, dtype = dtypes
    x_bytes = (dtype if recompute == "layer_narrow" else x_dtype).itemsize
    assert kept == sum(
        B * tokens * (D * (streams * x_bytes + branches * dtype.itemsize) + floats * 4)
        for tokens, streams, branches, floats in layer.rows(recompute)
    )


@every_kind
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("recompute", ["none", "qkv", "layer"])
def test_a_retained_graph_gives_the_same_bits_again_and_no_argument_is_changed(
    recompute, qk_norm, kind
):
    layer = LAYERS[kind](rotated=True, qk_norm=qk_norm)
    leaves = layer.leaves()
    y = layer.run(leaves, recompute=recompute)
    read = [dy := torch.randn_like(y), *(t.detach() for t in leaves.values())]
    before = [t.clone() for t in read]
    expected = gradients(layer.run(leaves, recompute=recompute), leaves, dy)
    for retain in (True, False):
        assert_same_bits(gradients(y, leaves, dy, retain_graph=retain), expected)
        assert all(map(torch.equal, read, before))


@every_kind
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(recompute, kind):
    layer = LAYERS[kind](rotated=True)
    names = list(layer.tensors)
    y = layer.run(leaves := layer.leaves(), recompute=recompute).sum()
    with Ops() as all_of_them:
        expected = gradients(y, leaves)
    heads = ("q_weight", "k_weight")
    alone = {name for name in names if name.endswith("_weight") and not name.endswith(heads)}
    for frozen in (*([name] for name in names), names[2:]):
        leaves = layer.leaves()
        for name in frozen:
            leaves[name].requires_grad_(False)
        y = layer.run(leaves, recompute=recompute).sum()
        with Ops() as seen:
            found = gradients(y, leaves)
        assert len(seen.calls) < len(all_of_them.calls) or not alone & {*frozen}
        assert_same_bits(found, {name: expected[name] for name in names if name not in frozen})


@every_kind
def test_refuses_a_second_derivative(kind):
    leaves = (layer := LAYERS[kind]()).leaves()
    sentence = f"^{layer.op.__name__} has no second derivative: call backward without create_graph"
    with pytest.raises(RuntimeError, match=sentence):
        gradients(layer.run(leaves).sum(), leaves, create_graph=True)


@every_kind
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_fake_tensors_have_its_shapes(recompute, kind):
    layer = LAYERS[kind](rotated=True)
    with FakeTensorMode() as mode:
        for given in (layer.tensors, layer.options):
            for name, t in given.items():
                given[name] = mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
        leaves = layer.leaves()
        y = layer.run(leaves, recompute=recompute)
        assert y.shape == layer.run(leaves, layer.specification).shape
        assert all(g.shape == leaves[n].shape for n, g in gradients(y.sum(), leaves).items())


OTHER_DTYPE = "must have the dtype of qkv_weight,"
REJECTED = {
    "parallel": [
        ("cross_q_bias", torch.zeros(24), "cross_q_bias must be None here, got a tensor"),
        ("modulation", torch.zeros(2, 144), r"\(B, 3 D\) = \(2, 72\) or .*, got \(2, 144\)"),
        ("modulation", torch.zeros(2, 4, 72), r"\(B, T, 3 D\) = \(2, 5, 72\), got \(2, 4, 72\)"),
        ("rotary", torch.zeros(2, 4, 8), r"rotary must be \(2, T, d\) = \(2, 5, 8\)"),
    ],
    "cross": [
        ("modulation", torch.zeros(2, 72), r"\(B, 6 D\) = \(2, 144\) or .*, got \(2, 72\)"),
        ("context", torch.zeros(2, 18), r"context must be \(B, S, C\) = \(2, S, C\), got \(2, 18"),
        ("context", torch.zeros(3, 6, 18), r"context must be .*, got \(3, 6, 18\)"),
        ("context", torch.zeros(2, 6, 17), r"cross_kv_weight must be \(48, 17\), got \(48, 18\)"),
        ("context", torch.zeros(2, 6, 18).int(), "context must be one of .*, got torch.int32"),
        ("cross_q_weight", None, r"cross_q_weight must be \(24, 24\), got None"),
        ("cross_out_weight", torch.zeros(24, 1), r"cross_out_weight must be \(24, 24\), got"),
        ("lengths", torch.tensor([7, 1]), "lengths must be from 0 to S = 6, got 1 to 7"),
        ("lengths", torch.tensor([6, -1]), "lengths must be from 0 to S = 6, got -1 to 6"),
        ("lengths", torch.tensor([6]), r"lengths must be \(B,\) = \(2,\) integers, .* got \(1,\)"),
        ("lengths", torch.ones(2, 6) > 0, r"no other mask is taken, got \(2, 6\) of torch.bool"),
        ("lengths", torch.zeros(2), r"no other mask is taken, got \(2,\) of torch.float32"),
        ("lengths", torch.zeros(2, device="meta").int(), "lengths must be on cpu, got meta"),
    ],
    "joint": [
        ("modulation", torch.zeros(2, 216), r"^modulation must be \(B, 6 D\) = \(2, 144\) or "),
        (
            "context.modulation",
            torch.zeros(2, 5, 144),
            r"context_modulation must be .* \(B, tokens, 6 D\) = \(2, 7, 144\), got \(2, 5, 144\)",
        ),
        ("context.x", torch.zeros(2, 24), r"context must be \(B, T, D\), got \(2, 24\)"),
        ("context.x", torch.zeros(3, 7, 24), "context must have the samples of x, 2, got 3"),
        (
            "context.x",
            torch.zeros(2, 7, 24).half(),
            "context must have the dtype of x, torch.float32",
        ),
        (
            "context.out_bias",
            torch.zeros(1),
            r"context_weights.out_bias must be \(24,\), got \(1,\)",
        ),
        ("context.fc1_weight", None, r"context_weights.fc1_weight must be .* got None"),
        ("rotary", torch.zeros(2, 5, 8), r"rotary must be \(2, T, d\) = \(2, 12, 8\)"),
        ("head_dim", 0, "head_dim must be at least 1, got 0"),
    ],
    "keys only": [
        ("context.modulation", torch.zeros(2, 144), r"\(B, 2 D\) = \(2, 48\) or .* got \(2, 144\)"),
        (
            "context.fc2_bias",
            torch.zeros(24),
            "context_weights.fc2_bias must be None here, got a t",
        ),
    ],
    "dual": [
        ("modulation", torch.zeros(2, 144), r"^modulation must be \(B, 9 D\) = \(2, 216\) or "),
        ("second.fc1_weight", torch.zeros(40, 24), "second_weights.fc1_weight must be None here"),
        ("second.k_weight", None, "q_weight and k_weight must be given together, got one of them"),
    ],
    "dual, keys only": [],
}
ALL_REJECT = [
    ("mlp", "relu", "mlp must be one of gelu, gelu_exact, swiglu, got relu"),
    ("norm", "batch", "norm must be one of layer, rms, got batch"),
    ("recompute", "all", "recompute must be one of none, .*, got all"),
    ("num_heads", 5, "num_heads must divide D = 24, got 5"),
    ("x", torch.zeros(2, 24), r"x must be \(B, T, D\), got \(2, 24\)"),
    ("fc2_weight", torch.zeros(25, 40), r"fc2_weight must be \(24, 40\), got \(25, 40\)"),
    ("k_weight", torch.zeros(8).half(), f"k_weight {OTHER_DTYPE} .* got torch.float16"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [(kind, *case) for kind in LAYERS for case in ALL_REJECT + REJECTED[kind]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects(kind, name, value, message):
    layer = LAYERS[kind](rotated=True)
    (layer.options if name in {"recompute", "norm", "head_dim", *layer.options} else layer.tensors)[
        name
    ] = value
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors)
