"""The linear map of a condition, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.one_layer import saved_bytes

from dbkernels.ops import linear

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
