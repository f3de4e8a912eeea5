"""What a head and its loss hold at their peak, beyond parameters and inputs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.measure import measure_peak
from dbkernels.ops import linear_cross_entropy, use_implementation

DTYPES = [torch.float32, torch.bfloat16]


def eager(x, weight, target, *, bias, reduction):
    return F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction=reduction)


def peak_bytes(f, tokens, V, D, dtype, reduction="mean"):
    """Forward and backward; gradients of x and of the head count."""
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.int64)

    def step():
        f(x, head.weight, target, bias=None, reduction=reduction).sum().backward()

    peak = measure_peak(step, model=head, inputs=[x, target])
    return peak.total_bytes - peak.by_category["parameters"] - peak.by_category["inputs"]


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ((2048, 5003, 64), partial(use_implementation, "torch")),
        ((16384, 50257, 768), FakeTensorMode),
    ],
    ids=["measured on a small head", "predicted for GPT-2"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_is_under_a_twentieth_of_eagers(size, where, dtype, reduction):
    with where():
        ours, eagers = (
            peak_bytes(f, *size, dtype, reduction) for f in (linear_cross_entropy, eager)
        )
    assert ours < eagers / 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_is_the_gradients_and_one_chunk(dtype):
    tokens, V, D, width = 16384, 50257, 768, torch.finfo(dtype).bits // 8
    chunk, padded = 1024, 50304
    gradients = tokens * D * width + V * D * 4  # of x, and of the weight in float32
    logits = chunk * padded * width
    if width < 4:
        logits += chunk * V * 4  # a CPU multiplies in float32 to sum in float32
    with FakeTensorMode():
        peak = peak_bytes(linear_cross_entropy, tokens, V, D, dtype)
    assert 0 <= peak - gradients - logits <= 2**22  # what a token or a chunk has
