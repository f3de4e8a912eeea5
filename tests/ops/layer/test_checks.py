import pytest
import torch
from ops.one_layer import OneLayer
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import LayerWeights, adaln_layer

F64 = torch.float64


def changed(change, **options):
    """A layer with some of its tensors and options replaced."""
    layer = OneLayer(rotated=True, **options)
    for name, value in change.items():
        (layer.options if name in ("num_heads", "mlp", "rotary") else layer.tensors)[name] = value
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "relu"}, "mlp must be one of gelu, swiglu, got relu"),
        ({"x": torch.zeros(2, 24)}, r"x must be \(B, T, D\), got \(2, 24\)"),
        ({"x": torch.zeros(2, 5, 24).int()}, "x must be one of .*, got torch.int32"),
        ({"fc1_bias": torch.zeros(40).int()}, "fc1_bias must be one of .*, got torch.int32"),
        ({"modulation": torch.zeros(2, 144, device="meta")}, "must be on one device, got"),
        ({"k_weight": torch.zeros(8, device="meta")}, "must be on one device, got"),
        (
            {"modulation": torch.zeros(2, 143)},
            r"modulation must be \(B, 6 D\) = \(2, 144\) or \(B, T, 6 D\) = \(2, 5, 144\), "
            r"got \(2, 143\)",
        ),
        ({"modulation": torch.zeros(1, 144)}, r"modulation must be .* got \(1, 144\)"),
        ({"modulation": torch.zeros(2, 4, 144)}, r"modulation must be .* got \(2, 4, 144\)"),
        ({"num_heads": 0}, "num_heads must divide D = 24, got 0"),
        ({"num_heads": 5}, "num_heads must divide D = 24, got 5"),
        ({"rotary": torch.zeros(2, 4, 8)}, r"rotary must be \(2, T, d\) = \(2, 5, 8\)"),
        ({"rotary": torch.zeros(2, 5, 8, device="meta")}, "must be on one device, got"),
        ({"num_heads": 24}, "the head width must be even to be rotated, got 1"),
        ({"q_weight": None}, "q_weight and k_weight must be given together, got one of them"),
        ({"k_weight": None}, "q_weight and k_weight must be given together, got one of them"),
        ({"qkv_weight": torch.zeros(24, 72)}, r"qkv_weight must be \(72, 24\), got \(24, 72\)"),
        ({"qkv_bias": torch.zeros(24)}, r"qkv_bias must be \(72,\), got \(24,\)"),
        ({"out_weight": torch.zeros(24, 1)}, r"out_weight must be \(24, 24\), got \(24, 1\)"),
        ({"out_bias": torch.zeros(1)}, r"out_bias must be \(24,\), got \(1,\)"),
        ({"fc1_weight": torch.zeros(80, 24)}, r"fc1_weight must be \(40, 24\), got \(80, 24\)"),
        ({"fc1_bias": torch.zeros(80)}, r"fc1_bias must be \(40,\), got \(80,\)"),
        ({"fc2_weight": torch.zeros(40, 24)}, r"fc1_weight must be \(24, 24\), got \(40, 24\)"),
        ({"fc2_weight": torch.zeros(25, 40)}, r"fc2_weight must be \(24, 40\), got \(25, 40\)"),
        ({"fc2_bias": torch.zeros(40)}, r"fc2_bias must be \(24,\), got \(40,\)"),
        ({"q_weight": torch.zeros(24)}, r"q_weight must be \(8,\), got \(24,\)"),
        ({"k_weight": torch.zeros(1)}, r"k_weight must be \(8,\), got \(1,\)"),
        (
            {"fc2_bias": torch.zeros(24, dtype=F64)},
            "fc2_bias must have the dtype of qkv_weight, torch.float32, got torch.float64",
        ),
        ({"k_weight": torch.zeros(8).half()}, "k_weight must have the dtype .* got torch.float16"),
    ],
)  # fmt: skip
def test_rejects(change, message):
    layer = changed(change)
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors)


def test_swiglu_has_two_hidden_layers_in_one():
    layer = changed({"fc1_weight": torch.zeros(40, 24)}, mlp="swiglu")
    with pytest.raises(ValueError, match=r"fc1_weight must be \(80, 24\), got \(40, 24\)"):
        layer.run(layer.tensors)


def test_rejects_an_unknown_policy():
    layer = OneLayer()
    message = "recompute must be one of none, attention, mlp, qkv, layer, layer_narrow, got all"
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors, recompute="all")


@pytest.mark.parametrize("d", [12, 264])
def test_rejects_heads_that_a_gpu_has_no_kernel_for(d):
    message = f"on a GPU the head width must be a multiple of 8 and at most 256, got {d}"
    with FakeTensorMode(), torch.device("cuda"), pytest.raises(ValueError, match=message):
        x, modulation, square = torch.empty(1, 2, d), torch.empty(1, 6 * d), torch.empty(d, d)
        weights = LayerWeights(
            torch.empty(3 * d, d), None, square, None, square, None, square, None
        )
        adaln_layer(x, modulation, weights, num_heads=1)
