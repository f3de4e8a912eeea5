import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm

# (1, 1, 1) smallest; 7 and 5 leave a ragged last split and a ragged last tile; 48, 257 and 1152
# leave masked lanes; 257 has two tiles to a program of backward, 1152 three pieces to a row
SHAPES = [(1, 1, 1), (2, 7, 48), (2, 5, 257), (1, 3, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARGS = ["x", "h", "gate", "scale", "shift"]
NAMES = ["x1", "y", *(f"d{name}" for name in ARGS)]


@pytest.fixture(params=implementations("gated_adaln_norm_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(B, T, D, dtype=torch.float32, *, offset=0.0, per_token=False):
    """x, h and three slices of a modulation of width 6 D, as the model passes them."""
    x = (offset + torch.randn(B, T, D)).to(dtype)
    modulation = (0.5 * torch.randn((B, T, 6 * D) if per_token else (B, 6 * D))).to(dtype)
    _, _, gate, shift, scale, _ = modulation.chunk(6, dim=-1)
    return x, torch.randn(B, T, D).to(dtype), gate, scale, shift


def results(f, args, kept=(0, 1), **options):
    """The kept ones of x1 and y, and the gradient in every argument of both at once."""

    def stacked(*args):
        outputs = f(*args, **options)
        return torch.stack([outputs[i] for i in kept])

    outputs, *grads = with_grads(stacked, *args)
    return *outputs, *grads


def assert_accurate(args, kept=(0, 1), **options):
    actual = results(gated_adaln_norm, args, kept, **options)
    eager = results(reference.gated_adaln_norm, args, kept, **options)
    exact = results(reference.gated_adaln_norm, [a.double() for a in args], kept, **options)
    names = [NAMES[i] for i in kept] + NAMES[2:]
    for name, *values in zip(names, actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *values)


# offset 30: with zero-mean inputs a kernel that saves mean and rstd in bfloat16 passes
@pytest.mark.parametrize(
    ("dtype", "norm", "eps", "offset"),
    [
        (torch.float32, "layer", 1e-6, 0.0),
        *((dtype, "layer", 1e-6, 30.0) for dtype in DTYPES),
        *((dtype, "rms", 0.3, 3.0) for dtype in DTYPES[:2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, norm, eps, offset):
    assert_accurate(inputs(*shape, dtype, offset=offset), norm=norm, eps=eps)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_each_token_may_have_its_own_modulation(dtype, norm):
    assert_accurate(inputs(2, 3, 65, dtype, per_token=True), norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "modulation_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_rounds_each_result_once(x_dtype, dtype, modulation_dtype, norm):
    x, h, *modulation = inputs(2, 7, 72, offset=3.0)
    args = [x.to(x_dtype), h.to(dtype), *(m.to(modulation_dtype) for m in modulation)]
    args = [a.detach().requires_grad_() for a in args]
    doubles = [a.detach().double().requires_grad_() for a in args]
    outputs = gated_adaln_norm(*args, norm=norm, eps=0.1)
    exact = reference.gated_adaln_norm(*doubles, norm=norm, eps=0.1)
    upstream = [torch.randn(2, 7, 72).to(output.dtype) for output in outputs]
    actual = *outputs, *torch.autograd.grad(outputs, args, upstream)
    exact = *exact, *torch.autograd.grad(exact, doubles, [u.double() for u in upstream])
    assert [a.dtype for a in actual] == [x_dtype, dtype, *(a.dtype for a in args)]
    for got, value in zip(actual, exact, strict=True):
        half = 1.01 * torch.finfo(got.dtype).eps / 2
        torch.testing.assert_close(got.double(), value, rtol=half + 2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_gradient_of_y_may_arrive_alone(dtype):
    assert_accurate(inputs(2, 7, 48, dtype, offset=3.0), [1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_gradient_of_the_stream_alone_is_that_of_the_residual(dtype):
    args = inputs(2, 7, 48, dtype, offset=3.0)
    *actual, dscale, dshift = results(gated_adaln_norm, args, [0])
    eager = results(lambda *args: [reference.gated_residual(*args)], args[:3], [0])
    doubles = [a.double() for a in args[:3]]
    exact = results(lambda *args: [reference.gated_residual(*args)], doubles, [0])
    assert not dscale.any() and not dshift.any()
    for name, *values in zip(["x1", *NAMES[2:5]], actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *values)


@pytest.mark.parametrize("processors", [1, 2, 100])
def test_any_number_of_programs_shares_the_samples(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    assert_accurate(inputs(1, 21, 40, offset=3.0))
    assert_accurate(inputs(2, 21, 40, torch.bfloat16), norm="rms")
    assert_accurate(inputs(9, 5, 40))


def test_eps_is_one_millionth_of_a_unit_of_variance():
    x, h, *modulation = inputs(2, 5, 40)
    actual = gated_adaln_norm(1e-3 * x, 1e-3 * h, *modulation)
    expected = reference.gated_adaln_norm(1e-3 * x, 1e-3 * h, *modulation, eps=1e-6)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_leaves_the_norm_of_x_and_can_open(dtype, norm):
    x, h, gate, scale, shift = inputs(2, 7, 65, dtype, offset=3.0)
    assert torch.equal(gated_adaln_norm(x, h, gate.zero_(), scale, shift)[0], x)
    y, dx, dh, dgate, *rest = results(gated_adaln_norm, (x, h, gate, scale, shift), [1], norm=norm)
    assert not dh.any() and dgate.all()
    alone = with_grads(lambda *args: adaln_norm(*args, norm=norm), x, scale, shift)
    assert all(map(torch.equal, (y, dx, *rest), alone))


def test_tokens_do_not_see_each_other():
    x, h, *modulation = inputs(2, 9, 40)
    order = torch.randperm(9)
    x1, y = gated_adaln_norm(x, h, *modulation)
    x1_there, y_there = gated_adaln_norm(x[:, order], h[:, order], *modulation)
    assert torch.equal(x1_there, x1[:, order]) and torch.equal(y_there, y[:, order])


@pytest.mark.parametrize("changed", range(5), ids=ARGS)
def test_samples_do_not_see_each_other(changed):
    args = inputs(2, 9, 40)
    before = [a.clone() for a in results(gated_adaln_norm, args)]
    args[changed][1] += torch.randn_like(args[changed][1])
    after = results(gated_adaln_norm, args)
    assert all(torch.equal(was[0], now[0]) for was, now in zip(before, after, strict=True))
    assert not torch.equal(before[1][1], after[1][1])


def test_same_bits_every_run():
    args = inputs(2, 21, 40)
    first, second = results(gated_adaln_norm, args), results(gated_adaln_norm, args)
    assert all(map(torch.equal, first, second))


def test_x_and_h_may_have_any_strides():
    x, h, *modulation = inputs(2, 9, 40)
    expected = results(gated_adaln_norm, (x, h, *modulation))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([h, -h], -1)[..., 0]
    actual = results(gated_adaln_norm, (*strided, *modulation))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    "strided",
    [
        lambda dy: dy[:1, :1, :1].expand(2, 9, 40),
        lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
        lambda dy: torch.stack([dy, -dy], -1)[..., 0],
    ],
    ids=["zero", "transposed", "every second"],
)
@pytest.mark.parametrize("output", [0, 1], ids=["x1", "y"])
def test_an_incoming_gradient_may_have_any_strides(output, strided):
    args = [a.detach().requires_grad_() for a in inputs(2, 9, 40)]
    upstream = [torch.randn(2, 9, 40), torch.randn(2, 9, 40)]
    upstream[output] = strided(upstream[output])
    actual = torch.autograd.grad(gated_adaln_norm(*args), args, upstream)
    upstream[output] = upstream[output].contiguous().clone()
    expected = torch.autograd.grad(gated_adaln_norm(*args), args, upstream)
    assert all(map(torch.equal, actual, expected))


def test_changes_none_of_its_arguments():
    args = inputs(2, 9, 40)
    before = [a.clone() for a in args]
    results(gated_adaln_norm, args)
    assert all(map(torch.equal, args, before))


def test_keeps_its_arguments_and_two_numbers_a_token():
    args = [a.requires_grad_() for a in inputs(2, 9, 40)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        gated_adaln_norm(*args)
    assert [t.data_ptr() for t in kept[:5]] == [t.data_ptr() for t in args]
    assert [(t.shape, t.dtype) for t in kept[5:]] == [((2, 9, 2), torch.float32)]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_an_empty_batch_has_zero_gradients(shape, per_token):
    args = inputs(*shape, per_token=per_token)
    x1, y, *grads = results(gated_adaln_norm, args)
    assert x1.shape == y.shape == shape
    for grad, arg in zip(grads, args, strict=True):
        assert torch.equal(grad, torch.zeros_like(arg))


def test_compiles_without_graph_breaks():
    args = inputs(2, 9, 40)
    torch.compiler.reset()
    # dynamic: sizes that vary from call to call, as the last batch of an epoch does
    compiled = torch.compile(gated_adaln_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    actual, expected = results(compiled, args), results(gated_adaln_norm, args)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_plain_torch_agrees_with_differences_in_float64(norm):
    with use_implementation("torch"):
        args = [a.double().requires_grad_() for a in inputs(2, 3, 5)]
        f = lambda *args: gated_adaln_norm(*args, norm=norm, eps=0.1)  # noqa: E731
        assert torch.autograd.gradcheck(f, args)


def test_refuses_a_second_derivative():
    args = [a.requires_grad_() for a in inputs(2, 5, 16)]
    with pytest.raises(RuntimeError, match="gated_adaln_norm has no second derivative"):
        torch.autograd.grad(gated_adaln_norm(*args)[0].sum(), args, create_graph=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[0], r"x and h must be \(B, T, D\), got \(2, 5, 16\) and \(5, 16\)"),
        ("h", lambda h: h[:, :4], r"x and h must be \(B, T, D\), got \(2, 4, 16\) and \(2, 5, 16"),
        ("gate", lambda gate: gate[:1], r"gate and scale and shift must be \(B, D\) = \(2, 16\)"),
        ("scale", lambda scale: scale[:, None], r"or \(B, T, D\) = \(2, 5, 16\)"),
        ("gate", lambda gate: gate.contiguous(), "slices of one modulation"),
        ("shift", lambda shift: shift.half(), "slices of one modulation"),
        *((name, torch.Tensor.long, f"{name} must be one of float32") for name in ARGS),
        *((name, lambda arg: arg.to("meta"), "must be on one device") for name in ARGS),
    ],
)
def test_rejects(name, change, message):
    args = dict(zip(ARGS, inputs(2, 5, 16), strict=True))
    with pytest.raises(ValueError, match=message):
        gated_adaln_norm(*(args | {name: change(args[name])}).values())


def test_rejects_an_unknown_norm():
    with pytest.raises(ValueError, match="norm must be layer or rms, got group"):
        gated_adaln_norm(*inputs(2, 5, 16), norm="group")
