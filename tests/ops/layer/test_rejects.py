"""What a layer refuses, with the name, the expected and the got."""

import pytest
import torch
from ops.one_layer import OneLayer

from dbkernels.ops import Condition, Draw, LayerWeights

OTHER_DEVICE = "must be on one device, got"
OTHER_DTYPE = "must have the dtype of qkv_weight,"
PER_TOKEN = r"\(B, T, 6 D\) = \(2, 5, 144\), got \(2, 143\)"
POLICIES = "none, attention, mlp, qkv, layer, layer_narrow"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mlp", "relu", "mlp must be one of gelu, gelu_exact, swiglu, got relu"),
        ("norm", "batch", "norm must be one of layer, rms, got batch"),
        ("recompute", "all", f"recompute must be one of {POLICIES}, got all"),
        ("num_heads", 0, "num_heads must divide D = 24, got 0"),
        ("num_heads", 5, "num_heads must divide D = 24, got 5"),
        ("head_dim", 0, "head_dim must be at least 1, got 0"),
        ("head_dim", 4, r"q_weight must be \(d,\) = \(4,\), got \(8,\)"),
        ("num_heads", 24, "the head width must be even to be rotated, got 1"),
        ("x", torch.zeros(2, 24), r"x must be \(B, T, D\), got \(2, 24\)"),
        ("x", torch.zeros(2, 5, 24).int(), "x must be one of .*, got torch.int32"),
        ("fc1_bias", torch.zeros(40).int(), "fc1_bias must be one of .*, got torch.int32"),
        ("modulation", torch.zeros(2, 143), rf"must be \(B, 6 D\) = \(2, 144\) or {PER_TOKEN}"),
        ("modulation", torch.zeros(1, 144), r"modulation must be .* got \(1, 144\)"),
        ("modulation", torch.zeros(2, 4, 144), r"modulation must be .* got \(2, 4, 144\)"),
        ("modulation", torch.zeros(2, 144, device="meta"), OTHER_DEVICE),
        ("k_weight", torch.zeros(8, device="meta"), OTHER_DEVICE),
        ("rotary", torch.zeros(2, 5, 8, device="meta"), OTHER_DEVICE),
        ("rotary", torch.zeros(2, 4, 8), r"rotary must be \(2, T, d\) = \(2, 5, 8\)"),
        ("q_weight", None, "q_weight and k_weight must be given together, got one of them"),
        ("k_weight", None, "q_weight and k_weight must be given together, got one of them"),
        ("qkv_weight", torch.zeros(24, 72), r"qkv_weight must be \(72, 24\), got \(24, 72\)"),
        ("qkv_bias", torch.zeros(24), r"qkv_bias must be \(72,\), got \(24,\)"),
        ("out_weight", torch.zeros(24, 1), r"out_weight must be \(24, 24\), got \(24, 1\)"),
        ("out_bias", torch.zeros(1), r"out_bias must be \(24,\), got \(1,\)"),
        ("fc1_weight", torch.zeros(80, 24), r"fc1_weight must be \(40, 24\), got \(80, 24\)"),
        ("fc1_bias", torch.zeros(80), r"fc1_bias must be \(40,\), got \(80,\)"),
        ("fc2_weight", torch.zeros(40, 24), r"fc1_weight must be \(24, 24\), got \(40, 24\)"),
        ("fc2_weight", torch.zeros(25, 40), r"fc2_weight must be \(24, 40\), got \(25, 40\)"),
        ("fc2_bias", torch.zeros(40), r"fc2_bias must be \(24,\), got \(40,\)"),
        ("q_weight", torch.zeros(24), r"q_weight must be \(d,\) = \(8,\), got \(24,\)"),
        ("k_weight", torch.zeros(1), r"k_weight must be \(d,\) = \(8,\), got \(1,\)"),
        ("fc2_bias", torch.zeros(24).double(), f"fc2_bias {OTHER_DTYPE} torch.float32, got .*64"),
        ("k_weight", torch.zeros(8).half(), "k_weight must have the dtype .* got torch.float16"),
        # swiglu has two hidden layers in one
        ("mlp", "swiglu", r"fc1_weight must be \(80, 24\), got \(40, 24\)"),
    ],
)  # fmt: skip
def test_rejects(name, value, message):
    layer = OneLayer(rotated=True)
    (layer.tensors if name in {"x", "modulation", *LayerWeights._fields} else layer.options)[
        name
    ] = value
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors)


@pytest.mark.parametrize("shape", [(2, 7), (2, 4, 7), (1, 5, 7)])
def test_rejects_a_condition_of_other_tokens(shape):
    layer = OneLayer()
    condition = Condition(torch.zeros(shape), lambda c: c)
    with pytest.raises(ValueError, match=r"c must be \(B, T, C\) = \(2, 5, C\), got"):
        layer.run({**layer.tensors, "modulation": condition}, recompute="layer")


@pytest.mark.parametrize("T", [5, 0])
@pytest.mark.parametrize("num_queries", [0, -1, 6, 2.0, "2"])
def test_rejects_what_is_no_number_of_tokens(num_queries, T):
    layer = OneLayer(2, T)
    message = f"num_queries must be an integer from 1 to T = {T}, or None, got {num_queries}"
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors, num_queries=num_queries)


@pytest.mark.parametrize(
    ("samples", "asked", "message"),
    [
        (2, {"attention": "none"}, "one of full, causal, two_stream, got none"),
        (3, {"attention": "two_stream"}, "two streams must have 2B samples, .*, got 3"),
        (2, {"attention": "causal", "num_queries": 5}, "num_queries .* attention causal, got 5"),
        (2, {"attention": "two_stream", "num_queries": 2}, "num_queries .* two_stream, got 2"),
        (2, {"num_samples": 1}, "num_samples must be None with attention full, got 1"),
        (2, {"attention": "causal", "num_samples": 2}, "num_samples .* attention causal, got 2"),
        (4, {"attention": "two_stream", "num_samples": 1}, "num_samples must be B = 2, .* got 1"),
        (4, {"attention": "two_stream", "num_samples": 0}, "num_samples must be B = 2, .* got 0"),
        (2, {"attention": "causal", "attention_dropout": 0.1}, "must be 0 with .* causal, got 0.1"),
        (
            2,
            {"attention": "two_stream", "attention_dropout": 0.1},
            "attention_dropout must be 0 with attention two_stream, got 0.1",
        ),
    ],
)
def test_rejects_what_an_attention_has_no_use_for(samples, asked, message):
    layer, draw = OneLayer(samples), {"draw": Draw(1, 2)} if "attention_dropout" in asked else {}
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors, **asked, **draw)
