import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import (
    NormOptions,
    _backward_op,
    _forward_op,
    adaln_norm,
    adaln_norm_backward,
    adaln_norm_forward,
)
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation

# (1, 1, 1) smallest; 7 and 11 leave a ragged last split; 64, 257 and 1152 leave masked lanes;
# 257 has three tiles to a program, 1152 three pieces to a row
SHAPES = [(1, 1, 1), (2, 7, 64), (3, 11, 257), (2, 3, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "dx", "dscale", "dshift"]


@pytest.fixture(params=implementations("adaln_norm_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(B, T, D, dtype=torch.float32, offset=0.0, per_token=False):
    """x and two slices of a modulation of width 6 D, as the model passes them."""
    x = (offset + torch.randn(B, T, D)).to(dtype)
    modulation = (0.5 * torch.randn((B, T, 6 * D) if per_token else (B, 6 * D))).to(dtype)
    return x, modulation[..., D : 2 * D], modulation[..., 2 * D : 3 * D]


def assert_accurate(args, dtype=None, **options):
    dtype = dtype or args[0].dtype
    actual = with_grads(lambda *args: adaln_norm(*args, dtype=dtype, **options), *args)
    eager = with_grads(lambda *args: reference.adaln_norm(*args, **options).to(dtype), *args)
    exact = with_grads(
        lambda *args: reference.adaln_norm(*args, **options), *(a.double() for a in args)
    )
    assert actual[0].dtype == dtype
    for name, *results in zip(NAMES, actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


# offset 30: with zero-mean inputs a kernel that saves mean and rstd in bfloat16 passes
@pytest.mark.parametrize(
    ("norm", "eps", "offset"), [("layer", 1e-6, 0.0), ("layer", 1e-6, 30.0), ("rms", 0.3, 3.0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, norm, eps, offset):
    assert_accurate(inputs(*shape, dtype, offset), norm=norm, eps=eps)


def test_bfloat16_is_rounded_once():
    args = inputs(2, 7, 64, torch.bfloat16, offset=3.0)
    exact = reference.adaln_norm(*(a.double() for a in args))
    error = (adaln_norm(*args).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 65)], ids=str)
def test_each_token_may_have_its_own_modulation(shape, norm):
    assert_accurate(inputs(*shape, per_token=True), norm=norm)


@pytest.mark.parametrize(
    ("x_dtype", "modulation_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_x_the_modulation_and_the_result_may_differ_in_dtype(x_dtype, modulation_dtype, dtype):
    x, scale, shift = inputs(2, 7, 72, offset=3.0)
    args = x.to(x_dtype), scale.to(modulation_dtype), shift.to(modulation_dtype)
    assert_accurate(args, dtype)


@pytest.mark.parametrize("processors", [1, 2, 100])
def test_any_number_of_programs_shares_the_samples(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    assert_accurate(inputs(1, 21, 40, offset=3.0))
    assert_accurate(inputs(2, 21, 40, torch.bfloat16))
    assert_accurate(inputs(9, 5, 40))


def test_eps_is_one_millionth_of_a_unit_of_variance():
    x, scale, shift = inputs(2, 5, 40)
    x = 1e-3 * x
    torch.testing.assert_close(
        adaln_norm(x, scale, shift), reference.adaln_norm(x, scale, shift, eps=1e-6)
    )


def test_layer_norm_ignores_the_scale_and_offset_of_x():
    x, scale, shift = inputs(2, 9, 40)
    torch.testing.assert_close(
        adaln_norm(3 * x + 7, scale, shift), adaln_norm(x, scale, shift), atol=1e-4, rtol=1e-4
    )


def test_zero_modulation_leaves_the_normalised_token():
    x, zero = inputs(2, 9, 40)[0], torch.zeros(2, 40)
    y = adaln_norm(x, zero, zero)
    torch.testing.assert_close(y, reference.normalise(x, "layer", 1e-6))


def test_tokens_do_not_see_each_other():
    x, scale, shift = inputs(2, 9, 40)
    order = torch.randperm(9)
    y = adaln_norm(x, scale, shift)
    assert torch.equal(adaln_norm(x[:, order], scale, shift), y[:, order])


def test_samples_do_not_see_each_other():
    x, scale, shift = inputs(2, 9, 40)
    grads = with_grads(adaln_norm, x, scale, shift)
    changed = x.clone()
    changed[1] += torch.randn(9, 40)
    for before, after in zip(grads, with_grads(adaln_norm, changed, scale, shift), strict=True):
        assert torch.equal(before[0], after[0])


def test_same_bits_every_run():
    args = inputs(2, 21, 40)
    assert all(map(torch.equal, with_grads(adaln_norm, *args), with_grads(adaln_norm, *args)))


def test_x_may_have_any_strides():
    x, scale, shift = inputs(2, 9, 40)
    expected = with_grads(adaln_norm, x, scale, shift)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, with_grads(adaln_norm, strided, scale, shift), expected))


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
    actual = torch.autograd.grad(adaln_norm(*args), args, dy)
    expected = torch.autograd.grad(adaln_norm(*args), args, dy.contiguous().clone())
    assert all(map(torch.equal, actual, expected))


def test_changes_none_of_its_arguments():
    args = inputs(2, 9, 40)
    before = [a.clone() for a in args]
    with_grads(adaln_norm, *args)
    assert all(map(torch.equal, args, before))


def test_keeps_its_arguments_and_two_numbers_a_token():
    x, scale, shift = (a.requires_grad_() for a in inputs(2, 9, 40))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        adaln_norm(x, scale, shift)
    assert {t.data_ptr() for t in kept[:3]} == {t.data_ptr() for t in (x, scale, shift)}
    assert [(t.shape, t.dtype) for t in kept[3:]] == [((2, 9, 2), torch.float32)]


def backward_inputs(dtype=torch.float32, D=65, norm="layer"):
    x, scale, shift = inputs(2, 7, D, dtype, offset=3.0)
    options = NormOptions(1e-6, norm == "layer", dtype)
    y, stats = adaln_norm_forward(x, scale, shift, options)
    sums = {"dscale": torch.empty(2, D), "dshift": torch.empty(2, D)}
    return torch.randn_like(x), torch.randn_like(x), (x, scale, shift, stats, options), y, sums


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_backward_adds_the_gradient_that_went_around(norm):
    dy, dres, saved, _, sums = backward_inputs(norm=norm)
    dx = adaln_norm_backward(dy, None, *saved, y=None, **sums)
    total = adaln_norm_backward(dy, dres, *saved, y=None, **sums)
    # compiled code rounds once where a product is added
    torch.testing.assert_close(total, dx + dres, rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_writes_y_again(dtype, norm):
    dy, _, saved, y, sums = backward_inputs(dtype, norm=norm)
    again = torch.empty_like(y)
    adaln_norm_backward(dy, None, *saved, y=again, **sums)
    x, scale, shift = saved[:3]
    exact = reference.adaln_norm(x.double(), scale.double(), shift.double(), norm=norm)
    assert_as_accurate_as_eager("y", again, y, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_may_write_y_over_its_gradient(dtype):
    dy, dres, saved, _, sums = backward_inputs(dtype)
    y = torch.empty_like(dy)
    dx = adaln_norm_backward(dy, dres, *saved, y=y, **sums)
    expected = [dx, y, *(s.clone() for s in sums.values())]
    actual = [adaln_norm_backward(dy, dres, *saved, y=dy, **sums), dy, *sums.values()]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("processors", [1, 100])
def test_backward_writes_its_sums_into_slices(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    dy, _, saved, _, sums = backward_inputs()
    adaln_norm_backward(dy, None, *saved, y=None, **sums)
    dmodulation = torch.zeros(2, 4 * 65)
    _, dscale, dshift, rest = dmodulation.chunk(4, dim=1)
    adaln_norm_backward(dy, None, *saved, y=None, dscale=dscale, dshift=dshift)
    assert torch.equal(dscale, sums["dscale"]) and torch.equal(dshift, sums["dshift"])
    assert not rest.any() and not dmodulation[:, :65].any()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_an_empty_batch_has_zero_gradients(shape, per_token):
    args = inputs(*shape, per_token=per_token)
    y, *grads = with_grads(adaln_norm, *args)
    assert y.shape == shape
    for grad, arg in zip(grads, args, strict=True):
        assert torch.equal(grad, torch.zeros_like(arg))


def test_forward_is_a_well_formed_torch_op():
    y, stats = torch.empty(2, 5, 16), torch.empty(2, 5, 2)
    torch.library.opcheck(_forward_op, (*inputs(2, 5, 16), y, stats, 1e-6, True))


@pytest.mark.parametrize("extra", [False, True])
def test_backward_is_a_well_formed_torch_op(extra):
    dy, dres, (x, scale, shift, stats, _), y, sums = backward_inputs(D=16)
    dres, y = (dres, y) if extra else (None, None)
    dx = torch.empty_like(x)
    args = dy, dres, x, scale, shift, stats, dx, y, *sums.values(), True
    torch.library.opcheck(_backward_op, args)


# dynamic: sizes that vary from call to call, as the last batch of an epoch does
@pytest.mark.parametrize(("per_token", "dynamic"), [(False, False), (False, True), (True, True)])
def test_compiles_without_graph_breaks(per_token, dynamic):
    args = inputs(2, 9, 40, per_token=per_token)
    torch.compiler.reset()
    compiled = torch.compile(adaln_norm, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert all(map(torch.equal, with_grads(compiled, *args), with_grads(adaln_norm, *args)))


def test_plain_torch_agrees_with_differences_in_float64():
    with use_implementation("torch"):
        for norm in ("layer", "rms"):
            args = [a.double().requires_grad_() for a in inputs(2, 3, 5)]
            f = lambda *args, norm=norm: adaln_norm(*args, norm=norm, eps=0.1)  # noqa: E731
            assert torch.autograd.gradcheck(f, args)


def test_refuses_a_second_derivative():
    x, scale, shift = (a.requires_grad_() for a in inputs(2, 5, 16))
    with pytest.raises(RuntimeError, match="adaln_norm has no second derivative"):
        torch.autograd.grad(adaln_norm(x, scale, shift).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, scale, shift: (x[0], scale, shift), r"x must be \(B, T, D\), got \(5, 16\)"),
        (lambda x, scale, shift: (x, scale[:1], shift[:1]), r"must be \(B, D\) = \(2, 16\)"),
        (lambda x, scale, shift: (x, scale, shift.contiguous()), "slices of one modulation"),
        (lambda x, scale, shift: (x, scale, shift.half()), "slices of one modulation"),
        (lambda x, scale, shift: (x.long(), scale, shift), "x must be one of float32"),
        (lambda x, scale, shift: (x, scale.long(), shift), "scale must be one of float32"),
        (lambda x, scale, shift: (x, scale, shift.long()), "shift must be one of float32"),
        (lambda x, scale, shift: (x, scale, shift.to("meta")), "must be on one device"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        adaln_norm(*change(*inputs(2, 5, 16)))


@pytest.mark.parametrize("option", [{"norm": "group"}, {"dtype": torch.bool}], ids=str)
def test_rejects_an_option(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*, got .*(group|bool)"):
        adaln_norm(*inputs(2, 5, 16), **option)
