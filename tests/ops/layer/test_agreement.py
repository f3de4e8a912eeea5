"""A layer against its specification: in float64, and as accurate as eager in the other dtypes."""

from itertools import product

import pytest
import torch
from ops.one_layer import (
    EVERY_POLICY,
    KINDS,
    SAME_BITS,
    OneLayer,
    assert_close,
    assert_same_bits,
    gradients,
    in_autocast,
)

from dbkernels.ops import adaln_layer, reference, use_implementation
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.layer import passes
from dbkernels.ops.layer.tensors import LayerCall, LayerOptions

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# x, modulation, weights: the third is a model in bfloat16 whose stream is not, the fourth one whose
# norms have weights of their own, which `fold_affine` leaves in float32
DTYPES = [
    (F32,) * 3, (BF16,) * 3, (F32, BF16, BF16), (BF16, F32, BF16), (BF16, F32, F32), (F16,) * 3
]  # fmt: skip
CHOICES = {"mlp": ("gelu", "swiglu"), "norm": ("layer", "rms")}
CHOICES |= dict.fromkeys(("bias", "qk_norm", "rotated", "per_token"), (True, False))


def coded(a, b, c, d):
    """Options by a code: over all 16 words any choices of any three options meet."""
    places = a, b, c, d, a ^ b ^ c, b ^ c ^ d
    return {name: values[i] for (name, values), i in zip(CHOICES.items(), places, strict=True)}


BITS = (0, 1)
OPTIONS = [coded(*word) for word in product(BITS, repeat=4)] + [
    {"mlp": "gelu_exact"},
    # heads wider together than the stream, and narrower; and each bias alone
    {"head_dim": 10, "rotated": True, "bias": ("qkv",)},
    {"head_dim": 2, "qk_norm": False, "bias": ("out",)},
    {"head_dim": 3, "mlp": "swiglu", "bias": ("fc1",)},
    {"mlp": "gelu_exact", "qk_norm": False, "bias": ("fc2",)},
]
# over both halves of these any choices of any two options meet, over one half each choice is there
HALVES = [
    [coded(a, b, c, a ^ b) for a, b, c in product(BITS, repeat=3) if b ^ c == half] for half in BITS
]
HALVES[0] += [{"mlp": "gelu_exact", "bias": False}]
SHARED = {"qk_norm": False, "mlp": "gelu_exact"}  # the published ViT's: of each sample
EACH = {"mlp": "swiglu", "rotated": True, "per_token": True}


@pytest.mark.parametrize("asked", [{"num_queries": 1}, {"num_queries": 4}, *KINDS], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_in_float64_at_every_policy(options, asked):
    layer = OneLayer(**options, dtypes=(F64,) * 3)
    # each norm feels its own
    told = {**asked, "eps": 0.1, "eps2": 0.7, "qk_eps": 0.3}
    exact = layer.exact(**told)
    for recompute in EVERY_POLICY:
        assert_close(layer.with_grads(recompute=recompute, **told), exact)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize(
    ("samples", "tokens", "asked"),
    [
        *((0, 5, kind) for kind in KINDS[:3]),
        *((2, 0, kind) for kind in KINDS),
        *((2, 1, kind) for kind in KINDS[1:]),
        *((1, 1, kind) for kind in KINDS[:2]),
        (0, 5, {"num_queries": 2}),
        (0, 5, {"attention": "two_stream", "num_samples": 0}),
    ],
)
@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
def test_one_token_or_none_agrees_too(options, samples, tokens, asked, recompute):
    layer = OneLayer(samples, tokens, **options, dtypes=(F64,) * 3)
    assert_close(layer.with_grads(recompute=recompute, **asked), layer.exact(**asked))


# parts of two samples leave one of one, chunks of three tokens leave one of one or two
@pytest.mark.parametrize(("part", "chunk"), [(10, 3), (1, 5)])
@pytest.mark.parametrize(
    ("samples", "asked"),
    [
        *((5, asked) for asked in ({}, {"num_queries": 1}, {"num_queries": 3}, KINDS[1])),
        *((10, {**KINDS[2], "num_samples": wanted}) for wanted in (None, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{**EACH, "norm": "rms"}, SHARED], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_small_parts_of_samples_and_chunks_of_tokens_agree_too(
    recompute, options, samples, asked, part, chunk, monkeypatch
):
    monkeypatch.setattr(passes, "PART", part * samples // 5)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", chunk)
    layer = OneLayer(samples, **options, dtypes=(F64,) * 3)
    assert_close(layer.with_grads(recompute=recompute, **asked), layer.exact(**asked))


@pytest.mark.parametrize(
    ("dtypes", "num_queries", "options"),
    [
        (dtypes, [None, 19][(i + half) % 2], options)
        for i, dtypes in enumerate(DTYPES)
        for half in BITS
        for options in HALVES[half]
    ],
    ids=str,
)
def test_as_accurate_as_eager_and_policies_give_the_same_bits(options, dtypes, num_queries):
    layer = OneLayer(3, 37, 128, 1, hidden=160, **options, dtypes=dtypes)
    first, *others, last = (
        layer.with_grads(recompute=recompute, num_queries=num_queries) for recompute in EVERY_POLICY
    )
    given = {"out": layer.tensors["x"], **layer.tensors}
    assert {name: t.dtype for name, t in first.items()} == {n: t.dtype for n, t in given.items()}
    for result in others if dtypes[0].itemsize > dtypes[2].itemsize else [*others, last]:
        assert_same_bits(result, first)
    # of fewer tokens the largest error that a rounded x leaves is a fluke
    compared = [first, last] if num_queries is None else [first]
    layer.assert_as_accurate_as_eager(*compared, num_queries=num_queries)


@pytest.mark.parametrize("num_queries", [None, 19])
@pytest.mark.parametrize("options", [{}, SHARED, EACH], ids=str)
def test_autocast_runs_the_branches_in_bfloat16_and_nothing_else(options, num_queries):
    layer = OneLayer(3, 37, 128, 1, hidden=160, **options)
    fused, told = in_autocast(adaln_layer), {"num_queries": num_queries}
    results = [layer.with_grads(fused, recompute=recompute, **told) for recompute in EVERY_POLICY]
    for result in results:
        assert {t.dtype for t in result.values()} == {F32}
    for result in results[1 : len(SAME_BITS)]:
        assert_same_bits(result, results[0])
    assert not torch.equal(results[0]["out"], layer.run(layer.tensors, **told))
    eager = layer.with_grads(in_autocast(reference.adaln_layer), **told)
    layer.compare([results[0], results[-1]], eager, **told)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_mean_of_x_that_is_large_beside_the_rest_is_not_rounded_with_it(norm):
    layer = OneLayer(3, 37, 128, 1, hidden=160, norm=norm, dtypes=(F32, BF16, BF16))
    layer.tensors["x"] = layer.tensors["x"].add(300.0 if norm == "layer" else 0.0)
    layer.assert_as_accurate_as_eager(layer.with_grads(recompute="layer_narrow"))


# of float16 alone, whose numbers end at 65504; a token that fits is kept as it is
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("channel", [1e5, 3e7, 60000.0])
def test_a_channel_past_the_range_of_float16_is_not_lost(channel, norm):
    layer = OneLayer(3, 37, 128, 1, hidden=160, norm=norm, dtypes=(F32, F16, F16))
    plain = layer.with_grads(recompute="layer_narrow")
    layer.tensors["x"][1, :, 5] = channel
    result = layer.with_grads(recompute="layer_narrow")
    layer.assert_as_accurate_as_eager(result)
    for name in ("out", "x", "modulation"):
        assert torch.equal(result[name][0], plain[name][0]), name


def test_narrowing_divides_by_a_power_of_two_where_a_token_does_not_fit():
    x = torch.tensor([[[3.0, -1.0], [65504.0, 1.0], [2e9, -2e9], [torch.inf, 0.0]]])
    options = LayerOptions(1, "gelu", *[NormOptions(0.0, False, F16)] * 2, 0.0, "layer_narrow")
    kept, scale = passes.narrowed(LayerCall(x, None, None, None, options))
    assert kept.dtype == F16 and kept[0, :3].isfinite().all() and kept[0, 3].isinf().any()
    assert scale[..., 0].tolist() == [[1.0, 2.0, 2.0**16, 1.0]]
    call = LayerCall(kept, None, None, None, options, scale)
    ((_, part),) = call.parts(F32, 100, lambda samples: None)
    torch.testing.assert_close(part.x[:, :3], x[:, :3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_a_gradient_that_passes_closed_gates_is_not_rounded_on_its_way(recompute):
    layer = OneLayer(dtypes=(F32, BF16, BF16))
    layer.tensors["modulation"].zero_()
    x = layer.tensors["x"].requires_grad_()
    out = layer.run(layer.tensors, recompute=recompute)
    dout = torch.randn(x.shape)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(dx, dout)


@pytest.mark.parametrize(
    ("recompute", "asked", "options"),
    [
        ("none", {}, SHARED),
        ("none", {"num_queries": 2}, SHARED),
        ("none", {"num_queries": 2}, EACH),
        ("mlp", {}, {**EACH, "norm": "rms", "bias": False}),
        ("qkv", {}, {"rotated": True, "dtypes": (F32, BF16, BF16)}),
        ("none", KINDS[2], {"mlp": "swiglu", "rotated": True}),
        ("qkv", KINDS[3], {**EACH, "dtypes": (F32, BF16, BF16)}),
    ],
)
def test_kernels_are_as_accurate_as_eager(recompute, asked, options):
    layer = OneLayer(2, 5, 24, 2, **options)
    with use_implementation("triton"):
        result = layer.with_grads(recompute=recompute, **asked)
    layer.assert_as_accurate_as_eager(result, **asked)


@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("recompute", ["mlp", "qkv", "layer"])
def test_many_small_parts_in_bfloat16_are_not_lost(recompute, num_queries, monkeypatch):
    monkeypatch.setattr(passes, "PART", 1)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", 1)
    layer, samples = OneLayer(1, 2, dtypes=(BF16,) * 3), 65
    for name in ("x", "modulation"):
        layer.tensors[name] = layer.tensors[name].repeat_interleave(samples, 0)
    # the sum of the weights' gradients grows from 256 by a half each, which bfloat16 rounds away
    factors = torch.full((samples, 1, 1), 0.5).index_fill(0, torch.tensor(0), 256)
    dy = (factors * torch.randn(num_queries or 2, 24)).to(BF16)
    leaves = layer.leaves()
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    y = layer.run(leaves, recompute=recompute, num_queries=num_queries)
    expected = layer.run(exact, reference.adaln_layer, num_queries=num_queries)
    expected = gradients(expected, exact, dy.double())
    for name, grad in gradients(y, leaves, dy).items():
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name
