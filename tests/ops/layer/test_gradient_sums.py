"""How sums of products of bfloat16 are rounded, and how parameters are cast."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import projection
from dbkernels.ops.layer.projection import QKV, Gradients, add_product, cast

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def sums(parameters, *, gpu, count=1, **options):
    gradients = Gradients(frozenset({"fc_weight", "fc_bias"}), parameters)
    with FakeTensorMode(), dry_run_on_gpu(132) if gpu else nullcontext():
        x, dy = torch.empty(5, 6, dtype=BF16), torch.empty(5, 4, dtype=BF16)
        for _ in range(count):
            gradients.add_weight("fc", dy, x, **options)
        gradients.add_bias("fc", dy)
    return {name: t.dtype for name, t in gradients.sums.items()}


@pytest.mark.parametrize(
    ("gpu", "parameters", "expected"),
    [(True, F32, F32), (True, BF16, BF16), (True, F64, BF16), (False, F32, BF16)],
    ids=str,
)
def test_a_gpu_gives_float32_parameters_gradients_that_were_never_rounded(
    gpu, parameters, expected
):
    assert sums(parameters, gpu=gpu) == {"fc_weight": expected, "fc_bias": expected}


@pytest.mark.parametrize("gpu", [False, True])
def test_parts_of_products_add_up_in_float32(gpu):
    assert sums(BF16, gpu=gpu, count=2, part=True)["fc_weight"] == F32


@pytest.mark.parametrize("num_queries", [None, 2])
def test_parts_are_not_rounded_before_they_add_up(num_queries):
    whole, y = torch.randn(2, 5, 72).to(BF16), torch.randn(2, 5, 24).to(BF16)
    dqkv = QKV(None, whole)
    if num_queries is not None:
        dqkv = QKV(whole[:, :num_queries, :24].contiguous(), whole[..., 24:].contiguous())
    gradients = Gradients(frozenset(["qkv_weight"]), F32)
    gradients.parts = True
    for _ in range(2):
        dqkv.add_to(gradients, y)
    expected = 2 * dqkv.whole().double().flatten(0, 1).T @ y.double().flatten(0, 1)
    torch.testing.assert_close(gradients.sums["qkv_weight"], expected.float())


def test_a_product_of_many_tokens_on_a_cpu_is_the_sum_of_its_chunks(monkeypatch):
    monkeypatch.setattr(projection, "CPU_CHUNK", 3)
    left, right, total = torch.randn(4, 10).to(BF16), torch.randn(10, 5).to(BF16), torch.ones(4, 5)
    add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left.float() @ right.float())


def cast_counting(tensors, dtype):
    """What cast gives, and how often it copied."""
    with patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copy:
        found = cast(tensors, dtype)
    return found, copy.call_count


@pytest.mark.parametrize(
    ("dtypes", "dtype", "calls"),
    [
        ((F32, None, F32, F32), BF16, 1),
        ((BF16, F32, BF16, torch.float16), F32, 2),  # sources of one dtype go together
        ((BF16, None, BF16), BF16, 0),
        ((None,), BF16, 0),
    ],
    ids=str,
)
def test_casts_all_at_once_to_the_same_bits_as_one_by_one(dtypes, dtype, calls):
    layouts = torch.randn(3, 5), torch.randn(2, 3, 4).transpose(0, 1), torch.randn(5, 3).T
    layouts = *layouts, torch.randn(4, 6)[:, :3]
    tensors = [t if d is None else t.to(d) for t, d in zip(layouts, dtypes, strict=False)]
    tensors = [None if d is None else t for t, d in zip(tensors, dtypes, strict=True)]
    found, called = cast_counting(tensors, dtype)
    assert called == calls
    for copy, tensor in zip(found, tensors, strict=True):
        alone = None if tensor is None else tensor.to(dtype)
        assert (copy is tensor) == (alone is tensor)
        if tensor is not None:
            assert (copy.dtype, copy.stride()) == (dtype, alone.stride())
            assert torch.equal(copy, alone)
