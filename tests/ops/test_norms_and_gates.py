"""What a norm or a gate alone promises, and how a layer has them write into its own tensors."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations
from ops.row_ops import BF16, DTYPES, F32, MIXED, ROW_OPS_BY_NAME, opcheck_calls

from dbkernels.ops import adaln_norm, gated_adaln_norm, gated_residual, reference
from dbkernels.ops.adaln_norm import NormOptions, adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.gated_adaln_norm import (
    gated_adaln_norm_backward,
    gated_adaln_norm_forward,
)
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward

NORMS = ["adaln_norm", "gated_adaln_norm"]
ALL = [*NORMS, "gated_residual"]


@pytest.fixture(params=implementations("adaln_norm_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(name, shape=(2, 7, 65), dtype=F32, offset=3.0):
    return ROW_OPS_BY_NAME[name].inputs(shape, dtype, offset=offset)[0]


@pytest.mark.parametrize(("x_dtype", "_", "modulation_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_result_of_a_norm_has_the_dtype_that_is_asked_for(x_dtype, _, modulation_dtype, dtype):
    x, *modulation = inputs("adaln_norm", (2, 7, 72))
    args = [x.to(x_dtype), *(m.to(modulation_dtype) for m in modulation)]
    actual = with_grads(lambda *args: adaln_norm(*args, dtype=dtype), *args)
    eager = with_grads(lambda *args: reference.adaln_norm(*args).to(dtype), *args)
    exact = with_grads(reference.adaln_norm, *(a.double() for a in args))
    assert actual[0].dtype == dtype
    for name, *values in zip(["y", "dx", "dscale", "dshift"], actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *values)


def test_bfloat16_is_rounded_once():
    args = inputs("adaln_norm", (2, 7, 64), BF16)
    exact = reference.adaln_norm(*(a.double() for a in args))
    error = (adaln_norm(*args).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5).all()


def test_layer_norm_ignores_the_scale_and_offset_of_x():
    x, scale, shift = inputs("adaln_norm", offset=0.0)
    torch.testing.assert_close(
        adaln_norm(3 * x + 7, scale, shift), adaln_norm(x, scale, shift), atol=1e-4, rtol=1e-4
    )


def test_zero_modulation_leaves_the_normalised_token():
    x, zero = inputs("adaln_norm")[0], torch.zeros(2, 65)
    torch.testing.assert_close(adaln_norm(x, zero, zero), reference.normalise(x, "layer", 1e-6))


def test_statistics_have_at_least_float32():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    kept = [statistics_dtype(torch.empty(1, dtype=dtype)) for dtype in dtypes]
    assert kept == [torch.float32, torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("option", [{"norm": "group"}, {"dtype": torch.bool}], ids=str)
def test_rejects_an_option(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*, got .*(group|bool)"):
        adaln_norm(*inputs("adaln_norm"), **option)


def test_rejects_an_unknown_norm():
    with pytest.raises(ValueError, match="norm must be one of layer, rms, got group"):
        gated_adaln_norm(*inputs("gated_adaln_norm"), norm="group")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_leaves_the_stream_and_can_open(dtype):
    x, h, gate = inputs("gated_residual", dtype=dtype, offset=0.0)
    y, _, dh, dgate = with_grads(gated_residual, x, h, gate.zero_())
    assert torch.equal(y, x) and not dh.any() and dgate.all()


def test_an_open_gate_adds_the_branch():
    x, h, gate = inputs("gated_residual", offset=0.0)
    y, dx, dh, _ = with_grads(gated_residual, x, h, gate.fill_(1))
    assert torch.equal(y, x + h) and torch.equal(dh, dx)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_leaves_the_norm_of_x_and_can_open(dtype, norm):
    x, h, gate, scale, shift = inputs("gated_adaln_norm", dtype=dtype)
    gate.zero_()
    assert torch.equal(gated_adaln_norm(x, h, gate, scale, shift)[0], x)
    y, dx, dh, dgate, *rest = with_grads(
        lambda *args: gated_adaln_norm(*args, norm=norm)[1], x, h, gate, scale, shift
    )
    assert not dh.any() and dgate.all()
    alone = with_grads(lambda *args: adaln_norm(*args, norm=norm), x, scale, shift)
    assert all(map(torch.equal, (y, dx, *rest), alone))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("output", [0, 1])
def test_a_gradient_of_the_stream_or_of_y_may_arrive_alone(output, dtype):
    args = inputs("gated_adaln_norm", (2, 7, 48), dtype)

    def output_of(f):
        return lambda *args: f(*args)[output]

    actual = with_grads(output_of(gated_adaln_norm), *args)
    specification = output_of(reference.gated_adaln_norm)
    if output == 0:
        assert not actual[4].any() and not actual[5].any()
        specification, args = reference.gated_residual, args[:3]
    eager = with_grads(specification, *args)
    exact = with_grads(specification, *(a.double() for a in args))
    for values in zip(actual, eager, exact, strict=False):
        assert_as_accurate_as_eager(f"output {output} and its gradients", *values)


class Buffers:
    """What forward leaves for backward, and backward with the caller's tensors."""

    def __init__(self, name, dtype=F32, *, x_dtype=None, norm="layer"):
        self.name, self.args = name, inputs(name, dtype=dtype)
        self.args[0] = self.args[0].to(x_dtype or dtype)
        self.options = NormOptions(1e-6, norm == "layer", dtype)
        self.x, *rest = self.args
        self.h, self.modulation = (None, rest) if name == "adaln_norm" else (rest[0], rest[1:])
        self.y, self.stats = self.forward() if name != "gated_residual" else (None, None)
        self.dy = torch.randn_like(self.x if self.y is None else self.y)
        self.dres = torch.randn_like(self.x)

    def forward(self, x1=None):
        if self.name == "adaln_norm":
            return adaln_norm_forward(self.options, *self.args)
        return gated_adaln_norm_forward(self.options, self.x, self.h, *self.modulation, x1)

    def backward(self, *, dres=None, dh=None, y=None, sums=None):
        """Every result that the op has, in one order."""
        sums = [torch.empty_like(m) for m in self.modulation] if sums is None else sums
        dh = torch.empty_like(self.h) if dh is None and self.h is not None else dh
        if self.name == "gated_residual":
            gated_residual_backward(self.dy, self.h, *self.modulation, dh=dh, dgate=sums[0])
            return [dh, *sums]
        branch = [] if self.h is None else [self.h]
        saved = self.dy, dres, self.x, *branch, *self.modulation, self.stats
        dx, dbranch = torch.empty_like(self.x), [] if self.h is None else [dh]
        op = gated_adaln_norm_backward if branch else adaln_norm_backward
        op(*saved, dx, *dbranch, y, *sums, self.options.centred)
        return [t for t in (dx, dh, y, *sums) if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_need_not_write_the_stream(dtype):
    b = Buffers("gated_adaln_norm", dtype)
    x1 = torch.empty_like(b.x)
    assert all(map(torch.equal, b.forward(x1), (b.y, b.stats)))
    assert torch.equal(x1, gated_adaln_norm(*b.args)[0])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_no_gradient_that_went_around_is_one_of_0(name, dtype, norm):
    b = Buffers(name, dtype, norm=norm)
    without = b.backward(y=torch.empty_like(b.y))
    around = b.backward(dres=0 * b.dres, y=torch.empty_like(b.y))
    assert all(map(torch.equal, without, around))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("name", NORMS)
def test_backward_adds_the_gradient_that_went_around(name, norm):
    b = Buffers(name, norm=norm)
    # compiled code rounds once where a product is added
    torch.testing.assert_close(
        b.backward(dres=b.dres)[0], b.backward()[0] + b.dres, rtol=2**-23, atol=2**-23
    )


@pytest.mark.parametrize("x_dtype", [None, F32])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_backward_writes_y_again(name, dtype, norm, x_dtype, implementation):
    b = Buffers(name, dtype, norm=norm, x_dtype=x_dtype)
    again = torch.empty_like(b.y)
    b.backward(dres=b.dres, y=again)
    if implementation != "torch" and name == "gated_adaln_norm":
        assert torch.equal(again, b.y)
    exact = getattr(reference, name)(*(a.double() for a in b.args), norm=norm)
    exact = exact[1] if name == "gated_adaln_norm" else exact
    assert_as_accurate_as_eager("y", again, b.y, exact)


@pytest.mark.parametrize("x_dtype", [None, F32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_backward_may_write_over_h_and_over_its_gradient(name, dtype, x_dtype):
    b = Buffers(name, dtype, x_dtype=x_dtype)
    before = [t.clone() for t in (b.dres, b.x, *b.modulation)]
    again = None if b.y is None else torch.empty_like(b.y)
    expected = b.backward(dres=b.dres, y=again)
    dy = b.dy.clone()
    actual = b.backward(dres=b.dres, dh=b.h, y=None if b.y is None else b.dy)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, (b.dres, b.x, *b.modulation), before))
    assert b.y is not None or torch.equal(b.dy, dy)


@pytest.mark.parametrize("x_dtype", [None, F32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_branch_may_be_written_over_the_stream(dtype, x_dtype):
    b = Buffers("gated_residual", dtype, x_dtype=x_dtype)
    expected = gated_residual(*b.args)
    gated_residual_forward(*b.args, y=b.x)
    assert torch.equal(b.x, expected)


@pytest.mark.parametrize("processors", [1, 100])
@pytest.mark.parametrize("name", ALL)
def test_backward_writes_its_sums_into_slices(name, processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    b = Buffers(name)
    count, whole = len(b.modulation), torch.zeros(2, 6 * 65)
    slices = whole.chunk(6, dim=1)[2 : 2 + count]
    expected = b.backward()[-count:]
    assert all(map(torch.equal, b.backward(sums=slices)[-count:], expected))
    assert not whole[:, : 2 * 65].any() and not whole[:, (2 + count) * 65 :].any()


@pytest.mark.parametrize("name", ["gated_adaln_norm", "gated_residual"])
def test_writes_no_row_beyond_the_last(name):
    b = Buffers(name)
    first, dh, y = torch.zeros(3, 3, 7, 65)
    if name == "gated_residual":
        gated_residual_forward(*b.args, y=first[:2])
    else:
        b.forward(first[:2])
    b.backward(dh=dh[:2], y=y[:2])
    assert first[:2].any() and dh[:2].any()
    assert not first[2].any() and not dh[2].any() and not y[2].any()


@pytest.mark.parametrize("name", NORMS)
def test_is_made_of_well_formed_torch_ops_with_what_a_layer_asks_for(name):
    b = Buffers(name)
    opcheck_calls(b.forward)
    opcheck_calls(b.backward)
    opcheck_calls(lambda: b.backward(dres=b.dres, y=torch.empty_like(b.y)))
