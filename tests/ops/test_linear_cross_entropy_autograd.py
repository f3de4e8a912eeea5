"""The gradients of head and loss under everything that autograd offers around a backward."""

from functools import partial

import pytest
import torch
from accuracy import with_grads
from ops.one_head import DTYPES, LEADING, REDUCTIONS, TILE, inputs, module, op, targets
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import linear_cross_entropy
from dbkernels.ops.backend.register import use_implementation


@pytest.fixture(params=["triton", "torch"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", TILE)
    with use_implementation(request.param):
        yield request.param


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_frozen_gets_no_gradient_and_no_matmul(reduction):
    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            count["matmuls"] += func.overloadpacket._qualified_op_name in MATMULS
            return func(*args, **(kwargs or {}))

    MATMULS = {"aten::mm", "aten::addmm", "aten::addmm_"}
    tensors, (target, _) = dict(zip(["x", "weight", "bias"], inputs(), strict=True)), targets()
    chunks = 3
    for wanted in (["x", "weight", "bias"], ["x"], ["weight"], ["bias"], []):
        count = {"matmuls": 0}
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        with Matmuls():
            loss = op(linear_cross_entropy, target, **leaves, reduction=reduction)
            if wanted:
                loss.sum().backward()
        assert [name for name, t in leaves.items() if t.grad is not None] == wanted
        forwards = 2 if reduction == "none" and wanted else 1
        assert count["matmuls"] == chunks * (forwards + len({"x", "weight"} & set(wanted)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_grad_mode_only_the_loss_is_computed(reduction):
    args, (target, _) = [a.requires_grad_() for a in inputs()], targets()
    expected = op(linear_cross_entropy, target, *args, reduction=reduction)
    with torch.no_grad():
        loss = op(linear_cross_entropy, target, *args, reduction=reduction)
    assert torch.equal(loss, expected) and expected.requires_grad and not loss.requires_grad


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_retained_graph_gives_the_same_bits_again(reduction, dtype):
    args, (target, _) = [a.requires_grad_() for a in inputs(dtype=dtype)], targets()
    loss = op(linear_cross_entropy, target, *args, reduction=reduction)
    upstream = 1 + torch.rand_like(loss)
    first = torch.autograd.grad(loss, args, upstream, retain_graph=True)
    before = [t.clone() for t in first]
    second = torch.autograd.grad(loss, args, upstream, retain_graph=True)
    third = torch.autograd.grad(loss, args, upstream)
    for again in (first, second, third):
        assert all(map(torch.equal, again, before))


def test_the_incoming_gradient_may_have_any_strides():
    args, (target, _) = [a.requires_grad_() for a in inputs()], targets()
    losses = op(linear_cross_entropy, target, *args, reduction="none")
    for dloss in (torch.randn(1, 1).expand(LEADING), torch.randn(9, 2).T):
        actual = torch.autograd.grad(losses, args, dloss, retain_graph=True)
        copied = dloss.contiguous().clone()
        assert all(
            map(torch.equal, actual, torch.autograd.grad(losses, args, copied, retain_graph=True))
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_runs_the_matmuls_in_bfloat16_and_gradients_keep_their_dtypes(reduction):
    args, (target, _) = inputs(), targets()
    leaves = [a.clone().requires_grad_() for a in args]
    halves = [a.bfloat16().requires_grad_() for a in args]
    with torch.autocast(args[0].device.type, torch.bfloat16):
        loss = op(linear_cross_entropy, target, *leaves, reduction=reduction)
        expected = op(linear_cross_entropy, target, *halves, reduction=reduction)
        assert torch.equal(loss, expected) and loss.dtype == torch.float32
        inside = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(loss.sum(), leaves)
    assert [t.dtype for t in outside] == [torch.float32] * 3
    assert all(map(torch.equal, inside, outside))
    for a, b in zip(outside, torch.autograd.grad(expected.sum(), halves), strict=True):
        torch.testing.assert_close(a.bfloat16(), b, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_graph_breaks(reduction):
    args, (target, token_weight) = inputs(), targets()
    options = {"token_weight": token_weight, "reduction": reduction}
    call = partial(op, linear_cross_entropy, target, **options)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for now, before in zip(with_grads(compiled, *args), with_grads(call, *args), strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
def test_plain_torch_agrees_with_differences_in_float64(reduction, given, monkeypatch):
    monkeypatch.setattr(module, "TILE", 2)
    x, weight, bias = torch.randn(5, 3), torch.randn(6, 3), torch.randn(6)
    args = [a.double().requires_grad_() for a in (x, weight, bias)[:given]]
    target = torch.tensor([0, 5, -100, 3, 3])
    with use_implementation("torch"):
        call = partial(op, linear_cross_entropy, target, reduction=reduction)
        call = partial(call, token_weight=torch.rand(5).double())
        assert torch.autograd.gradcheck(call, args)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_refuses_a_second_derivative(reduction):
    args, (target, _) = [a.requires_grad_() for a in inputs()], targets()
    loss = op(linear_cross_entropy, target, *args, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, args, create_graph=True)


def test_small_upstream_gradients_are_not_lost_in_float16():
    args, (target, _) = inputs(dtype=torch.float16), targets()
    args = [a.requires_grad_() for a in args]
    loss = op(linear_cross_entropy, target, *args, reduction="sum")
    whole = torch.autograd.grad(loss, args, torch.tensor(1.0), retain_graph=True)
    # itself a number that float16 can only round, by a sixtieth
    small = torch.autograd.grad(loss, args, torch.tensor(1.8e-6 / 1.03))
    for a, b in zip(whole, small, strict=True):
        torch.testing.assert_close(b.float(), a.float() * 1.8e-6 / 1.03, rtol=1e-3, atol=4e-8)
