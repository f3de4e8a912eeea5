import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops.backend import columns, tile
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.swiglu import _backward_op, _forward_op, swiglu, swiglu_backward, swiglu_forward

# (1, 2) smallest; 7 and 37 leave a ragged last tile of rows; all but 1024 leave masked columns;
# 1200 has three column tiles
SHAPES = [(1, 2), (7, 64), (5, 1024), (37, 300), (2, 9, 1200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=implementations("swiglu_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(*shape, dtype=torch.float32, bias_dtype=None):
    """(a | b) with a wide enough to reach both tails of silu, and a bias of columns far apart."""
    h = (2 * torch.randn(shape)).to(dtype)
    return h, torch.randn(shape[-1]).to(bias_dtype or dtype)


def assert_accurate(*args):
    actual = with_grads(swiglu, *args)
    eager = with_grads(reference.swiglu, *args)
    exact = with_grads(reference.swiglu, *(a.double() for a in args))
    for name, *results in zip(["u", "dh", "dbias"], actual, eager, exact, strict=False):
        assert_as_accurate_as_eager(name, *results)
    assert [a.dtype for a in actual] == [args[0].dtype, *(a.dtype for a in args)]


@pytest.mark.parametrize("given", [1, 2], ids=["without bias", "with bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, given):
    assert_accurate(*inputs(*shape, dtype=dtype)[:given])


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1::-1], DTYPES[1:]], ids=str)
def test_the_bias_may_have_another_dtype(dtypes):
    assert_accurate(*inputs(7, 72, dtype=dtypes[0], bias_dtype=dtypes[1]))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(dtype):
    # columns where h and bias nearly cancel: their sum in the dtype of h would be rounded
    h, bias = inputs(9, 40, dtype=dtype, bias_dtype=torch.float32)
    args = [(h - 30).requires_grad_(), (bias + 30).requires_grad_()]
    doubles = [a.detach().double().requires_grad_() for a in args]
    du = torch.randn(9, 20).to(dtype)
    u, exact = swiglu(*args), reference.swiglu(*doubles)
    dh, dbias = torch.autograd.grad(u, args, du)
    dh_exact, dbias_exact = torch.autograd.grad(exact, doubles, du.double())
    half = 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(u.double(), exact, rtol=half, atol=1e-5)
    torch.testing.assert_close(dh.double(), dh_exact, rtol=half, atol=1e-5)
    torch.testing.assert_close(dbias.double(), dbias_exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processors", [1, 2, 100])
def test_any_number_of_programs_shares_the_rows(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    assert_accurate(*inputs(21, 40))
    assert_accurate(*inputs(21, 300, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 4, 21])
def test_any_number_of_chunks_shares_the_rows(rows, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK", rows * 40 // torch.get_num_threads())
    assert_accurate(*inputs(21, 40))
    assert_accurate(*inputs(21, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_it_is_the_product_or_zero(dtype):
    a = torch.tensor([-1e4, -300, -120, 0, 60, 300, 1e4], dtype=dtype)
    h = torch.cat([a, torch.full_like(a, 3)])[None].requires_grad_()
    u = swiglu(h, torch.zeros(14, dtype=dtype))
    assert torch.equal(u[0], 3 * a.relu())
    (dh,) = torch.autograd.grad(u, h, torch.full_like(u, 2))
    assert dh[0, :7].tolist() == [0, 0, 0, 3, 6, 6, 6]
    assert torch.equal(dh[0, 7:], 2 * a.relu())


@pytest.mark.parametrize("half", [0, 1])
def test_a_fault_upstream_stays_visible(half):
    h = torch.ones(1, 4)
    h[0, 2 * half] = torch.nan
    u, dh = with_grads(swiglu, h)
    assert u.isnan().tolist() == [[True, False]]
    # db does not depend on b
    assert dh.isnan().tolist() == [[True, False, not half, False]]


def test_the_first_half_is_the_one_in_silu():
    a, b = torch.randn(2, 5, 8)
    u = swiglu(torch.cat([a, b], dim=1))
    torch.testing.assert_close(u, a / (1 + torch.exp(-a)) * b)


def test_rows_do_not_see_each_other():
    h, bias = inputs(13, 40)
    order = torch.randperm(13)
    assert torch.equal(swiglu(h[order], bias), swiglu(h, bias)[order])
    changed = h.clone()
    changed[5:] = torch.randn(8, 40)
    before, after = with_grads(swiglu, h, bias), with_grads(swiglu, changed, bias)
    assert torch.equal(before[1][:5], after[1][:5])


def test_same_bits_every_run():
    args = inputs(37, 300)
    assert all(map(torch.equal, with_grads(swiglu, *args), with_grads(swiglu, *args)))


def test_h_and_bias_may_have_any_strides():
    h, bias = inputs(2, 9, 40)
    expected = with_grads(swiglu, h, bias)
    strided = h.transpose(0, 2).contiguous().transpose(0, 2), bias.repeat_interleave(2)[::2]
    assert all(map(torch.equal, with_grads(swiglu, *strided), expected))


@pytest.mark.parametrize(
    "strided",
    [
        lambda du: du[:1, :1].expand(9, 20),
        lambda du: du.t().contiguous().t(),
        lambda du: torch.stack([du, -du], -1)[..., 0],
    ],
    ids=["zero", "transposed", "every second"],
)
def test_the_incoming_gradient_may_have_any_strides(strided):
    args = [a.requires_grad_() for a in inputs(9, 40)]
    du = strided(torch.randn(9, 20))
    actual = torch.autograd.grad(swiglu(*args), args, du)
    expected = torch.autograd.grad(swiglu(*args), args, du.contiguous().clone())
    assert all(map(torch.equal, actual, expected))


def test_a_frozen_bias_changes_no_other_gradient():
    h, bias = inputs(9, 40)
    dh = with_grads(swiglu, h, bias)[1]
    assert torch.equal(with_grads(lambda h: swiglu(h, bias), h)[1], dh)


def test_changes_none_of_its_arguments():
    args = inputs(9, 40)
    before = [a.clone() for a in args]
    with_grads(swiglu, *args)
    assert all(map(torch.equal, args, before))


def test_keeps_its_arguments_only():
    h, bias = (a.requires_grad_() for a in inputs(9, 40))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        swiglu(h, bias)
    assert [t.data_ptr() for t in kept] == [h.data_ptr(), bias.data_ptr()]


def backward_outputs(h, du, bias):
    dbias = torch.empty(h.shape[1], dtype=torch.float32)
    out = {"dh": torch.empty_like(h), "u": torch.empty_like(du), "dbias": dbias}
    swiglu_backward(h, du, bias, **out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_writes_u_again(dtype):
    h, bias = inputs(9, 40, dtype=dtype)
    exact = reference.swiglu(h.double(), bias.double())
    actual = backward_outputs(h, torch.randn_like(h[:, :20]), bias)["u"]
    assert_as_accurate_as_eager("u", actual, swiglu_forward(h, bias), exact)


@pytest.mark.parametrize("bias_given", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_may_write_over_its_inputs_in_some_rows_of_a_tensor(
    dtype, bias_given, monkeypatch
):
    monkeypatch.setattr(columns, "CHUNK", 4 * 300)
    h, bias = inputs(33, 300, dtype=dtype)
    du = torch.randn_like(h[:, :150])
    bias = bias if bias_given else None
    rows = slice(5, 26)
    expected = backward_outputs(h[rows], du[rows], bias)

    h_before, du_before, dbias = h.clone(), du.clone(), torch.empty(300)
    swiglu_backward(h[rows], du[rows], bias, dh=h[rows], u=du[rows], dbias=dbias)
    assert all(map(torch.equal, (h[rows], du[rows], dbias), expected.values()))
    for now, before in ((h, h_before), (du, du_before)):
        assert torch.equal(now[:5], before[:5]) and torch.equal(now[26:], before[26:])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_an_empty_batch_has_zero_gradients(shape):
    u, dh, dbias = with_grads(swiglu, *inputs(*shape))
    assert u.shape == (*shape[:-1], 8) and dh.shape == shape and torch.equal(dbias, torch.zeros(16))


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_a_well_formed_torch_op(bias):
    h, bias = inputs(5, 16)[0], torch.randn(16) if bias else None
    torch.library.opcheck(_forward_op, (h, bias, torch.empty(5, 8)))


@pytest.mark.parametrize("extra", [True, False])
def test_backward_is_a_well_formed_torch_op(extra):
    h, bias = inputs(5, 16)
    u, dbias = (torch.empty(5, 8), torch.empty(16)) if extra else (None, None)
    args = h, torch.randn(5, 8), bias, torch.empty_like(h), u, dbias
    torch.library.opcheck(_backward_op, args)


@pytest.mark.parametrize("given", [1, 2], ids=["without bias", "with bias"])
def test_compiles_without_graph_breaks(given):
    args = inputs(2, 9, 40)[:given]
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, with_grads(compiled, *args), with_grads(swiglu, *args)))


def test_plain_torch_agrees_with_differences_in_float64():
    with use_implementation("torch"):
        args = [a.double().requires_grad_() for a in inputs(3, 6)]
        assert torch.autograd.gradcheck(swiglu, args)


def test_refuses_a_second_derivative():
    h, bias = (a.requires_grad_() for a in inputs(5, 16))
    with pytest.raises(RuntimeError, match="swiglu has no second derivative"):
        torch.autograd.grad(swiglu(h, bias).sum(), h, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, bias: (h[0, 0], bias), r"h must be \(..., 2 F\) with F at least 1, got \(\)"),
        (lambda h, bias: (h[:, :0], bias), r"with F at least 1, got \(5, 0\)"),
        (lambda h, bias: (h[:, :7], bias), r"with F at least 1, got \(5, 7\)"),
        (lambda h, bias: (h, bias[:4]), r"bias must be \(2 F,\) = \(16,\), got \(4,\)"),
        (lambda h, bias: (h, bias[None]), r"bias must be \(2 F,\) = \(16,\), got \(1, 16\)"),
        (lambda h, bias: (h.long(), bias), "h must be one of float32"),
        (lambda h, bias: (h, bias.long()), "bias must be one of float32"),
        (lambda h, bias: (h, bias.to("meta")), "h and bias must be on one device"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu(*change(*inputs(5, 16)))
