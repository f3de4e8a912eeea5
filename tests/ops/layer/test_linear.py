import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager, with_grads

from dbkernels.memory.measure import measure_peak
from dbkernels.ops import linear

SHAPES = [(7,), (3, 7), (2, 5, 7)]


def inputs(*shape, dtype=torch.float64):
    return [t.to(dtype) for t in (torch.randn(shape) + 3, torch.randn(4, 7), torch.randn(4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, given, dtype):
    args = inputs(*shape, dtype=dtype)[:given]
    exact = with_grads(F.linear, *(a.double() for a in args))
    names = ("y", "dx", "dweight", "dbias")
    for name, *values in zip(
        names, with_grads(linear, *args), with_grads(F.linear, *args), exact, strict=False
    ):
        assert values[0].dtype == dtype
        assert_as_accurate_as_eager(name, *values)


@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
def test_gradients_agree_with_differences(given):
    args = [a.requires_grad_() for a in inputs(2, 3, 7)[:given]]
    assert torch.autograd.gradcheck(linear, args)


def test_computes_in_autocasts_dtype_and_gives_gradients_in_the_tensors_own():
    args = [a.requires_grad_() for a in inputs(3, 7, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = linear(*args), F.linear(*args)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    for grad, other, arg in zip(
        torch.autograd.grad(y.sum(), args), torch.autograd.grad(expected.sum(), args), args,
        strict=True,
    ):  # fmt: skip
        assert grad.dtype == arg.dtype
        torch.testing.assert_close(grad, other, rtol=1e-2, atol=1e-2)


def test_keeps_no_rounded_copy_of_the_weight():
    weight = torch.nn.Parameter(torch.randn(600, 50))
    model, x = torch.nn.Module(), torch.randn(2, 50, requires_grad=True)
    model.weight = weight

    def saved(function):
        def step():
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x, weight)
            y.float().sum().backward()
            x.grad = weight.grad = None

        return measure_peak(step, model=model, inputs=[x]).saved_bytes

    assert saved(F.linear) >= weight.numel() * 2
    assert saved(linear) == 0


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
    for actual, expected in zip(
        with_grads(compiled, *args), with_grads(linear, *args), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_refuses_a_second_derivative():
    x, weight, _ = inputs(3, 7)
    y = linear(x.requires_grad_(), weight)
    with pytest.raises(RuntimeError, match="linear"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 7), (4, 6), (4,)), r"\(..., D_in\) and \(D_out, D_in\), got \(3, 7\) and \(4, 6\)"),
        (((), (4, 7), (4,)), r"got \(\) and \(4, 7\)"),
        (((3, 7), (7,), (4,)), r"got \(3, 7\) and \(7,\)"),
        (((3, 7), (4, 7), (5,)), r"bias must be \(4,\), got \(5,\)"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        linear(*map(torch.zeros, shapes))


def test_rejects_integers():
    with pytest.raises(ValueError, match="weight must be one of float32"):
        linear(torch.zeros(3, 7), torch.zeros(4, 7, dtype=torch.int64))
