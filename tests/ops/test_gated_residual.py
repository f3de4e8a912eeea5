import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.gated_residual import (
    _backward_op,
    _forward_op,
    gated_residual,
    gated_residual_backward,
    gated_residual_forward,
)

# (1, 1, 1) smallest; 7 and 19 leave a ragged last split and a ragged last tile; 48, 257 and 1152
# leave masked lanes; 257 has two tiles to a program, 1152 three pieces to a row
SHAPES = [(1, 1, 1), (2, 7, 48), (3, 19, 257), (2, 3, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "dx", "dh", "dgate"]


@pytest.fixture(params=implementations("gated_residual_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(B, T, D, dtype=torch.float32, *, offset=0.0, per_token=False):
    """x, h and the last slice of a modulation of width 6 D, as the model passes them."""
    x, h = (offset + torch.randn(B, T, D)).to(dtype), torch.randn(B, T, D).to(dtype)
    modulation = (0.5 * torch.randn((B, T, 6 * D) if per_token else (B, 6 * D))).to(dtype)
    return x, h, modulation[..., 5 * D :]


def assert_accurate(*args):
    actual = with_grads(gated_residual, *args)
    eager = with_grads(reference.gated_residual, *args)
    exact = with_grads(reference.gated_residual, *(a.double() for a in args))
    assert [a.dtype for a in actual] == [args[0].dtype, *(a.dtype for a in args)]
    for name, *results in zip(NAMES, actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype):
    assert_accurate(*inputs(*shape, dtype))
    assert_accurate(*inputs(*shape, dtype, offset=30.0))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 65)], ids=str)
def test_each_token_may_have_its_own_gate(shape, dtype):
    assert_accurate(*inputs(*shape, dtype, per_token=True))


@pytest.mark.parametrize(
    ("x_dtype", "h_dtype", "gate_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_rounds_each_result_once(x_dtype, h_dtype, gate_dtype):
    x, h, gate = inputs(2, 7, 72, offset=30.0)
    args = [a.requires_grad_() for a in (x.to(x_dtype), h.to(h_dtype), gate.to(gate_dtype))]
    doubles = [a.detach().double().requires_grad_() for a in args]
    dy = torch.randn(2, 7, 72).to(x_dtype)
    y, y_exact = gated_residual(*args), reference.gated_residual(*doubles)
    actual = [y, *torch.autograd.grad(y, args, dy)]
    exact = [y_exact, *torch.autograd.grad(y_exact, doubles, dy.double())]
    assert [a.dtype for a in actual] == [x_dtype, x_dtype, h_dtype, gate_dtype]
    for got, value in zip(actual, exact, strict=True):
        half = 1.01 * torch.finfo(got.dtype).eps / 2
        torch.testing.assert_close(got.double(), value, rtol=half + 1e-6, atol=1e-6)


@pytest.mark.parametrize("processors", [1, 2, 100])
def test_any_number_of_programs_shares_the_samples(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    assert_accurate(*inputs(1, 21, 40, offset=3.0))
    assert_accurate(*inputs(2, 21, 40, torch.bfloat16))
    assert_accurate(*inputs(9, 5, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_leaves_the_stream_and_can_open(dtype):
    x, h, gate = inputs(2, 7, 65, dtype)
    y, _, dh, dgate = with_grads(gated_residual, x, h, gate.zero_())
    assert torch.equal(y, x) and not dh.any() and dgate.all()


def test_an_open_gate_adds_the_branch():
    x, h, gate = inputs(2, 7, 65)
    y, dx, dh, _ = with_grads(gated_residual, x, h, gate.fill_(1))
    assert torch.equal(y, x + h) and torch.equal(dh, dx)


def test_tokens_do_not_see_each_other():
    x, h, gate = inputs(2, 9, 40)
    order = torch.randperm(9)
    y = gated_residual(x, h, gate)
    assert torch.equal(gated_residual(x[:, order], h[:, order], gate), y[:, order])


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["x", "h", "gate"])
def test_samples_do_not_see_each_other(changed):
    args = [*inputs(2, 9, 40)]
    before = with_grads(gated_residual, *args)
    args[changed] = args[changed].clone()
    args[changed][1] += torch.randn_like(args[changed][1])
    after = with_grads(gated_residual, *args)
    assert all(torch.equal(was[0], now[0]) for was, now in zip(before, after, strict=True))
    assert not torch.equal(before[0][1], after[0][1])


def test_same_bits_every_run():
    args = inputs(2, 21, 40)
    first, second = with_grads(gated_residual, *args), with_grads(gated_residual, *args)
    assert all(map(torch.equal, first, second))


def test_x_and_h_may_have_any_strides():
    x, h, gate = inputs(2, 9, 40)
    expected = with_grads(gated_residual, x, h, gate)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([h, -h], -1)[..., 0]
    assert all(map(torch.equal, with_grads(gated_residual, *strided, gate), expected))


@pytest.mark.parametrize(
    "strided",
    [
        lambda dy: dy[:1, :1, :1].expand(2, 9, 40),
        lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
        lambda dy: torch.stack([dy, -dy], -1)[..., 0],
    ],
    ids=["zero", "transposed", "every second"],
)
def test_the_incoming_gradient_may_have_any_strides(strided):
    args = [a.detach().requires_grad_() for a in inputs(2, 9, 40)]
    dy = strided(torch.randn(2, 9, 40))
    actual = torch.autograd.grad(gated_residual(*args), args, dy)
    expected = torch.autograd.grad(gated_residual(*args), args, dy.contiguous().clone())
    assert all(map(torch.equal, actual, expected))


def test_changes_none_of_its_arguments():
    args = inputs(2, 9, 40)
    before = [a.clone() for a in args]
    with_grads(gated_residual, *args)
    assert all(map(torch.equal, args, before))


def test_keeps_the_branch_and_its_gate_only():
    x, h, gate = (a.requires_grad_() for a in inputs(2, 9, 40))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        gated_residual(x, h, gate)
    assert [t.data_ptr() for t in kept] == [h.data_ptr(), gate.data_ptr()]


def mixed_inputs(dtype, x_dtype):
    x, h, gate = inputs(2, 7, 65, dtype)
    return x.to(x_dtype or dtype), h, gate


@pytest.mark.parametrize("x_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_may_write_over_x(dtype, x_dtype):
    x, h, gate = mixed_inputs(dtype, x_dtype)
    expected = gated_residual(x, h, gate)
    gated_residual_forward(x, h, gate, y=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("x_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_may_write_over_h(dtype, x_dtype):
    dy, h, gate = mixed_inputs(dtype, x_dtype)
    before = dy.clone()
    expected, actual = (torch.empty_like(h), torch.empty_like(gate)), (h, torch.empty_like(gate))
    for dh, dgate in (expected, actual):
        gated_residual_backward(dy, h, gate, dh=dh, dgate=dgate)
    assert all(map(torch.equal, actual, expected)) and torch.equal(dy, before)


@pytest.mark.parametrize("processors", [1, 100])
def test_backward_writes_its_sum_into_a_slice(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    dy, h, gate = inputs(2, 7, 65)
    dh, dgate, whole = torch.empty_like(h), torch.empty(2, 65), torch.zeros(2, 3 * 65)
    gated_residual_backward(dy, h, gate, dh=dh, dgate=dgate)
    gated_residual_backward(dy, h, gate, dh=dh, dgate=whole[:, 65:130])
    assert torch.equal(whole[:, 65:130], dgate)
    assert not whole[:, :65].any() and not whole[:, 130:].any()


def test_writes_no_row_beyond_the_last():
    x, h, gate = inputs(2, 7, 65)
    y, dh = torch.zeros(2, 3, 7, 65)
    gated_residual_forward(x, h, gate, y=y[:2])
    gated_residual_backward(x, h, gate, dh=dh[:2], dgate=torch.empty_like(gate))
    assert not y[2].any() and not dh[2].any()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_an_empty_batch_has_zero_gradients(shape, per_token):
    args = inputs(*shape, per_token=per_token)
    y, *grads = with_grads(gated_residual, *args)
    assert y.shape == shape
    for grad, arg in zip(grads, args, strict=True):
        assert torch.equal(grad, torch.zeros_like(arg))


def test_forward_is_a_well_formed_torch_op():
    torch.library.opcheck(_forward_op, (*inputs(2, 5, 16), torch.empty(2, 5, 16)))


def test_backward_is_a_well_formed_torch_op():
    outputs = torch.empty(2, 5, 16), torch.empty(2, 16)
    torch.library.opcheck(_backward_op, (*inputs(2, 5, 16), *outputs))


# dynamic: sizes that vary from call to call, as the last batch of an epoch does
@pytest.mark.parametrize(("per_token", "dynamic"), [(False, True), (True, False)])
def test_compiles_without_graph_breaks(per_token, dynamic):
    args = inputs(2, 9, 40, per_token=per_token)
    torch.compiler.reset()
    compiled = torch.compile(gated_residual, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert all(map(torch.equal, with_grads(compiled, *args), with_grads(gated_residual, *args)))


def test_plain_torch_agrees_with_differences_in_float64():
    with use_implementation("torch"):
        args = [a.double().requires_grad_() for a in inputs(2, 3, 5)]
        assert torch.autograd.gradcheck(gated_residual, args)


def test_refuses_a_second_derivative():
    args = [a.requires_grad_() for a in inputs(2, 5, 16)]
    with pytest.raises(RuntimeError, match="gated_residual has no second derivative"):
        torch.autograd.grad(gated_residual(*args).sum(), args, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, h, gate: (x[0], h[0], gate), r"x and h must be \(B, T, D\), got \(5, 16\)"),
        (lambda x, h, gate: (x, h[:, :4], gate), r"got \(2, 4, 16\) and \(2, 5, 16\)"),
        (lambda x, h, gate: (x, h, gate[:1]), r"gate must be \(B, D\) = \(2, 16\) or \(B, T, D\)"),
        (lambda x, h, gate: (x, h, gate.repeat(1, 2)[:, ::2]), "gate must be slices of one modul"),
        (lambda x, h, gate: (x.long(), h, gate), "x must be one of float32"),
        (lambda x, h, gate: (x, h.long(), gate), "h must be one of float32"),
        (lambda x, h, gate: (x, h, gate.long()), "gate must be one of float32"),
        (lambda x, h, gate: (x, h, gate.to("meta")), "x and h and gate must be on one device"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        gated_residual(*change(*inputs(2, 5, 16)))
