import torch
from ops.one_layer import OneLayer
from torch import nn

from dbkernels.ops.layer.tensors import (
    Activations,
    LayerModulation,
    LayerOptions,
    LayerWeights,
)


def test_the_modulation_between_the_branches_closes_one_and_opens_the_next():
    parts = LayerModulation(*torch.arange(6.0).split(1))
    # gate1, scale2 and shift2
    assert [part.item() for part in parts.between] == [2, 4, 3]


def test_slices_of_a_modulation_come_shift_scale_gate():
    assert LayerModulation._fields == ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")


def test_weights_come_as_the_layer_uses_them_and_norms_may_be_left_out():
    linears = [nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)]
    weights = LayerWeights(*(p for linear in linears for p in (linear.weight, linear.bias)))
    assert weights.qkv_weight is linears[0].weight and weights.fc2_bias is linears[3].bias
    assert weights.fc1_weight is linears[2].weight and weights.qk_norms == (None, None)


def test_the_norms_of_queries_and_keys_come_in_this_order():
    weights = OneLayer().weights
    assert weights.qk_norms == (weights.q_weight, weights.k_weight)


def test_activations_come_in_the_order_of_the_forward():
    names = ("stats1", "q", "qkv", "attended", "logsumexp", "a", "stats2", "hidden", "m")
    assert Activations._fields == names


def test_a_layer_gives_all_tokens_unless_it_is_told_otherwise():
    assert LayerOptions(1, "gelu", None, "none").num_queries is None
