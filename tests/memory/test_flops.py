import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbkernels.memory.tracker import Tracker

B, H, T, D = 2, 3, 5, 8


def counted(step):
    with Tracker(torch.device("cpu")) as tracker:
        step()
    return tracker.flops


def test_a_matmul_takes_two_operations_for_each_product():
    assert counted(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    "function", [torch.addmm, torch.Tensor.addmm_, torch.ops.aten._addmm_activation]
)
def test_a_matmul_that_is_added_counts_as_one(function):
    total, left, right = torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 5)
    if function is torch.ops.aten._addmm_activation:
        total = torch.ones(5)
    assert counted(lambda: function(total, left, right)) == 2 * 2 * 3 * 5


def test_elementwise_ops_take_none():
    assert counted(lambda: torch.ones(100).exp().sum()) == 0


def test_attention_counts_two_matmuls_and_five_in_its_backward():
    q, k, v = (torch.ones(B, H, T, D, requires_grad=True) for _ in range(3))
    matmul = 2 * B * H * T * T * D
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * matmul
    step = F.scaled_dot_product_attention(q, k, v).sum()
    assert counted(step.backward) == 5 * matmul


def test_agrees_with_torch_on_a_network_and_its_backward():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(3, 8)
    with FlopCounterMode(display=False) as expected:
        model(x).sum().backward()
    assert counted(lambda: model(x).sum().backward()) == expected.get_total_flops() > 0


def test_fake_tensors_take_as_many():
    def step():
        (torch.ones(2, 3) @ torch.ones(3, 5)).sum()

    with FakeTensorMode():
        assert counted(step) == 2 * 2 * 3 * 5
