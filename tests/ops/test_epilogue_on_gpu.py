"""GELU in the epilogue of fc1, against float64 and eager: only a GPU's matmul has its tanh form."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from ops.one_layer import OneLayer

from dbkernels.ops import LayerWeights, reference
from dbkernels.ops.layer.branches import mlp

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def eager(y, w):
    h = torch.nn.functional.linear(y, w.fc1_weight, w.fc1_bias)
    return torch.nn.functional.linear(reference.gelu(h), w.fc2_weight, w.fc2_bias)


@pytest.mark.parametrize(
    "shape", [(2, 256, 1152), (3, 77, 384), (1, 1, 64), (128, 256, 384)], ids=str
)
def test_a_branch_that_keeps_no_pre_activation_is_as_accurate_as_eager(shape, size):
    B, T, D = size(shape, (2, 5, 32))
    w = OneLayer(1, 1, D, 1, hidden=4 * D, qk_norm=False, dtypes=(BF16,) * 3).weights
    y = (torch.randn(B, T, D) + 1).to(BF16)
    exact = eager(y.double(), LayerWeights(*(None if t is None else t.double() for t in w)))
    expected = eager(y, w)
    assert_as_accurate_as_eager("m", mlp(y, "gelu", w, hidden=None), expected, exact)


@pytest.mark.parametrize("recompute", ["mlp", "qkv", "layer"])
def test_a_layer_whose_policy_drops_the_pre_activation_is_as_accurate_as_eager(recompute, size):
    B, T, D, H = size((4, 256, 1152, 16), (2, 5, 24, 3))
    layer = OneLayer(B, T, D, H, hidden=4 * D, qk_norm=False, dtypes=(BF16,) * 3)
    layer.assert_as_accurate_as_eager(layer.with_grads(recompute=recompute))
