"""What a layer calls: forward and backward that write into tensors of their caller."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops._norm import Modulation, NormOptions
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.gated_adaln_norm import (
    _backward_op,
    _forward_op,
    gated_adaln_norm,
    gated_adaln_norm_backward,
    gated_adaln_norm_forward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=implementations("gated_adaln_norm_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def backward_inputs(dtype=torch.float32, D=65, norm="layer", x_dtype=None):
    """dy, dx1, what forward leaves for backward, and y."""
    x, h = (3 + torch.randn(2, 7, D)).to(x_dtype or dtype), torch.randn(2, 7, D).to(dtype)
    _, _, gate, shift, scale, _ = (0.5 * torch.randn(2, 6 * D)).to(dtype).chunk(6, dim=1)
    modulation, options = Modulation(gate, scale, shift), NormOptions(1e-6, norm == "layer", dtype)
    y, stats = gated_adaln_norm_forward(x, h, modulation, options, x1=None)
    saved = x, h, modulation, stats, options
    return torch.randn_like(y), torch.randn_like(x), saved, y


def backward(dy, dx1, saved, *, dh=None, y=None):
    """dx, dh, y and the gradient of the modulation."""
    _, h, modulation, *_ = saved
    dh = torch.empty_like(h) if dh is None else dh
    dmodulation = Modulation(*map(torch.empty_like, modulation))
    dx = gated_adaln_norm_backward(dy, dx1, *saved, dh=dh, y=y, dmodulation=dmodulation)
    return dx, dh, y, *dmodulation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_need_not_write_the_stream(dtype):
    _, _, (x, h, modulation, stats, options), y = backward_inputs(dtype)
    x1 = torch.empty_like(x)
    y_with, stats_with = gated_adaln_norm_forward(x, h, modulation, options, x1=x1)
    assert torch.equal(y_with, y) and torch.equal(stats_with, stats)
    assert torch.equal(x1, gated_adaln_norm(x, h, *modulation)[0])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_of_the_stream_is_one_of_0(dtype, norm):
    dy, dx1, saved, y = backward_inputs(dtype, norm=norm)
    without = backward(dy, None, saved, y=torch.empty_like(y))
    assert all(map(torch.equal, without, backward(dy, 0 * dx1, saved, y=torch.empty_like(y))))


@pytest.mark.parametrize("x_dtype", [None, torch.float32])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_writes_y_again(dtype, norm, x_dtype, implementation):
    dy, dx1, saved, y = backward_inputs(dtype, norm=norm, x_dtype=x_dtype)
    again = backward(dy, dx1, saved, y=torch.empty_like(y))[2]
    if implementation != "torch":
        assert torch.equal(again, y)
    else:
        x, h, modulation, *_ = saved
        args = [a.double() for a in (x, h, *modulation)]
        exact = reference.gated_adaln_norm(*args, norm=norm)[1]
        assert_as_accurate_as_eager("y", again, y, exact)


@pytest.mark.parametrize("x_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_may_write_over_h_and_over_its_gradient(dtype, x_dtype):
    dy, dx1, saved, y = backward_inputs(dtype, x_dtype=x_dtype)
    kept = [t.clone() for t in (dx1, saved[0], saved[3])]
    expected = backward(dy, dx1, saved, y=torch.empty_like(y))
    actual = backward(dy, dx1, saved, dh=saved[1], y=dy)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, kept, (dx1, saved[0], saved[3])))


@pytest.mark.parametrize("processors", [1, 100])
def test_backward_writes_its_sums_into_slices(processors, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    dy, dx1, saved, _ = backward_inputs()
    expected = backward(dy, dx1, saved)[3:]
    whole = torch.zeros(2, 6 * 65)
    _, _, gate, shift, scale, _ = whole.chunk(6, dim=1)
    gated_adaln_norm_backward(
        dy, dx1, *saved, dh=torch.empty_like(dy), y=None, dmodulation=Modulation(gate, scale, shift)
    )
    assert all(map(torch.equal, (gate, scale, shift), expected))
    assert not whole[:, : 2 * 65].any() and not whole[:, 5 * 65 :].any()


def test_writes_no_row_beyond_the_last():
    dy, dx1, saved, _ = backward_inputs()
    x, h, modulation, _, options = saved
    x1, dh, y = torch.zeros(3, 3, *x.shape[1:])
    gated_adaln_norm_forward(x, h, modulation, options, x1=x1[:2])
    backward(dy, dx1, saved, dh=dh[:2], y=y[:2])
    assert not x1[2].any() and not dh[2].any() and not y[2].any()


@pytest.mark.parametrize("extra", [False, True])
def test_forward_is_a_well_formed_torch_op(extra):
    _, x1, (x, h, modulation, stats, _), y = backward_inputs(D=16)
    x1 = x1 if extra else None
    torch.library.opcheck(_forward_op, (x, h, *modulation, x1, y, stats, 1e-6, True))


@pytest.mark.parametrize("extra", [False, True])
def test_backward_is_a_well_formed_torch_op(extra):
    dy, dx1, (x, h, modulation, stats, _), y = backward_inputs(D=16)
    dx1, y = (dx1, y) if extra else (None, None)
    outputs = torch.empty_like(x), torch.empty_like(h), y, *map(torch.empty_like, modulation)
    torch.library.opcheck(_backward_op, (dy, dx1, x, h, *modulation, stats, *outputs, True))
