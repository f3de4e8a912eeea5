"""The linear map of a condition, and how a layer's sums and casts are rounded."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.one_layer import saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import linear
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer.gradients import Gradients, add_product, cast
from dbkernels.ops.layer.qkv import QKV

NAMES = ("y", "dx", "dweight", "dbias")


def inputs(*shape, dtype=torch.float64):
    return [t.to(dtype) for t in (torch.randn(shape) + 3, torch.randn(4, 7), torch.randn(4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7)], ids=str)
def test_as_accurate_as_eager(shape, given, dtype):
    args = inputs(*shape, dtype=dtype)[:given]
    exact = with_grads(F.linear, *(a.double() for a in args))
    results = with_grads(linear, *args), with_grads(F.linear, *args), exact
    for name, *values in zip(NAMES[: given + 1], *results, strict=True):
        assert values[0].dtype == dtype
        assert_as_accurate_as_eager(name, *values)


def test_computes_in_autocasts_dtype_and_gives_gradients_in_the_tensors_own():
    args = [a.requires_grad_() for a in inputs(3, 7, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = linear(*args), F.linear(*args)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    grads, others = (torch.autograd.grad(out.sum(), args) for out in (y, expected))
    for grad, other, arg in zip(grads, others, args, strict=True):
        assert grad.dtype == arg.dtype
        torch.testing.assert_close(grad, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("op", "copies"), [(F.linear, 1), (linear, 0)])
def test_keeps_no_rounded_copy_of_the_weight(op, copies):
    leaves = [a.requires_grad_() for a in inputs(3, 7, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: op(*leaves), but=leaves)
    assert kept == copies * 2 * (leaves[0].numel() + leaves[1].numel())


@pytest.mark.parametrize("name", range(3))
def test_only_what_wants_a_gradient_gets_one(name):
    args = inputs(3, 7)
    args[name].requires_grad_()
    linear(*args).sum().backward()
    assert [a.grad is not None for a in args] == [i == name for i in range(3)]


def test_takes_a_strided_input_and_gradient():
    x, weight, bias = inputs(3, 7)
    x = x.T.contiguous().T.requires_grad_()
    y = linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    dy = torch.randn(4, 3, dtype=torch.float64).T
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ weight)


def test_compiles_without_graph_breaks():
    args = inputs(3, 7, dtype=torch.float32)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_grads(compiled, *args), with_grads(linear, *args))


def test_refuses_a_second_derivative():
    x, weight, _ = inputs(3, 7)
    y = linear(x.requires_grad_(), weight)
    with pytest.raises(RuntimeError, match="linear has no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((3, 7), (4, 6), (4,)), torch.float32, r"\(D_out, D_in\), got \(3, 7\) and \(4, 6\)"),
        (((), (4, 7), (4,)), torch.float32, r"x and weight must be .*, got \(\) and \(4, 7\)"),
        (((3, 7), (7,), (4,)), torch.float32, r"\(..., D_in\) and .* got \(3, 7\) and \(7,\)"),
        (((3, 7), (4, 7), (5,)), torch.float32, r"bias must be \(4,\), got \(5,\)"),
        (((3, 7), (4, 7), (4,)), torch.int64, "x must be one of float32"),
    ],
)
def test_rejects(shapes, dtype, message):
    with pytest.raises(ValueError, match=message):
        linear(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


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
    monkeypatch.setattr("dbkernels.ops.layer.gradients.CPU_CHUNK", 3)
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
