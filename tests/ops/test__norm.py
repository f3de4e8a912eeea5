import pytest
import torch
import triton
import triton.language as tl

from dbkernels.ops import _norm
from dbkernels.ops.reference import normalise


@triton.jit
def _norm_kernel(
    x_ptr, g_ptr, x_hat_ptr, stats_ptr, dx_ptr, D, eps,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One row, stored with its idle lanes."""
    every_lane = BLOCK_D * PIECES
    here = tl.full((1, 1), 1, tl.int1)
    x = _norm.load_vector(x_ptr, 0, D, 1, BLOCK_D, PIECES)
    g = _norm.load_vector(g_ptr, 0, D, 1, BLOCK_D, PIECES)
    x_hat, mean, rstd = _norm.normalise_row(x, D, eps, CENTRED, BLOCK_D, PIECES)
    dx = _norm.normalise_row_backward(g, x_hat, rstd, D, CENTRED, PIECES)
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(x_hat_ptr + cols, x_hat[piece], mask=here & (cols < every_lane))
        tl.store(dx_ptr + cols, dx[piece], mask=here & (cols < every_lane))
    tl.store(stats_ptr + tl.zeros((1, 1), tl.int32), mean)
    tl.store(stats_ptr + 1 + tl.zeros((1, 1), tl.int32), rstd)


def expected(x, g, norm, eps):
    x = x.double().requires_grad_()
    x_hat = normalise(x, norm, eps)
    (dx,) = torch.autograd.grad(x_hat, x, g.double())
    mean = x.mean(-1) if norm == "layer" else torch.zeros(x.shape[:-1], dtype=torch.float64)
    rstd = ((x - mean[..., None]).square().mean(-1) + eps).rsqrt()
    return x_hat.detach(), torch.stack([mean, rstd], -1).detach(), dx


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("D", [1, 50, 64, 150])
def test_a_row_in_pieces_is_normalised_and_differentiated(D, norm):
    x, g = 3 + 2 * torch.randn(D), torch.randn(D)
    x_hat, dx, stats = torch.empty(192), torch.empty(192), torch.empty(2)
    _norm_kernel[(1,)](x, g, x_hat, stats, dx, D, 0.1, norm == "layer", BLOCK_D=64, PIECES=3)
    exact = expected(x, g, norm, 0.1)
    for actual, value in zip((x_hat[:D], stats, dx[:D]), exact, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=1e-5)


def test_lanes_past_the_row_are_0_and_count_in_no_mean():
    x, g = 5 + torch.randn(50), torch.randn(50)
    x_hat, dx, stats = torch.empty(192), torch.empty(192), torch.empty(2)
    _norm_kernel[(1,)](x, g, x_hat, stats, dx, 50, 1e-6, True, BLOCK_D=64, PIECES=3)
    assert torch.equal(x_hat[50:], torch.zeros(142))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_plain_torch_normalises_and_differentiates(norm, dtype):
    x, g = (3 + 2 * torch.randn(2, 5, 40)).to(dtype), torch.randn(2, 5, 40).to(dtype)
    x_hat, stats = _norm.normalise(x, 0.1, norm == "layer")
    assert x_hat.dtype == stats.dtype == _norm.statistics_dtype(x)
    wide = x.to(stats.dtype)
    torch.testing.assert_close(_norm.standardise(wide, stats), x_hat)
    dx = _norm.normalise_backward(g.to(stats.dtype), wide, x_hat, stats, norm == "layer")
    for actual, value in zip((x_hat, stats, dx), expected(x, g, norm, 0.1), strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=1e-5)


def test_plain_torch_leaves_the_gradient_it_was_given():
    x, g = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    before = g.clone()
    x_hat, stats = _norm.normalise(x, 1e-6, True)
    _norm.normalise_backward(g, x, x_hat, stats, True)
    _norm.normalise_backward(g, x, x_hat, stats, False)
    assert torch.equal(g, before)


def test_statistics_have_at_least_float32():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    kept = [_norm.statistics_dtype(torch.empty(1, dtype=dtype)) for dtype in dtypes]
    assert kept == [torch.float32, torch.float32, torch.float32, torch.float64]
