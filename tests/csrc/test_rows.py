"""Rows of any width and dtype, the cut of (B, T, D) into tasks, and sums over tokens."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from threads import with_threads

from dbkernels import ops
from dbkernels.ops import reference
from dbkernels.ops.backend.register import use_implementation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
raw = torch.ops.dbkernels


@pytest.fixture(autouse=True)
def compiled():
    with use_implementation("cpp"):
        yield


def inputs(B, T, D):
    """x, h, gate, scale and shift."""
    modulation = torch.randn(B, 6 * D).chunk(6, dim=1)
    return 3 + torch.randn(B, T, D), torch.randn(B, T, D), *modulation[:3]


def together(x, h, gate, scale, shift):
    """Every op with sums over tokens, of one sample and of all."""
    x, y = ops.gated_adaln_norm(x, h, gate, scale, shift)
    y = ops.adaln_norm(ops.gated_residual(x, y, gate), scale, shift)
    y = ops.gelu(y, shift[0]) + ops.swiglu(torch.cat([y, x], -1), torch.cat([gate[0], shift[0]]))
    even = 3 * (y.shape[-1] // 6 * 2)
    q, k = ops.qk_norm_rotary(
        y[..., :even], 1, q_weight=gate[0, : even // 3], k_weight=scale[0, : even // 3]
    )
    return torch.cat([q.flatten(2), k.flatten(2), y], dim=-1)


# each is worth several threads; 257 begins rows, and so vectors, at odd addresses
@pytest.mark.parametrize("shape", [(3, 171, 257), (65, 9, 180), (1, 3000, 33)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    args = inputs(*shape)
    one, two, five = (with_threads(n, lambda: with_grads(together, *args)) for n in (1, 2, 5))
    assert all(map(torch.equal, one, two)) and all(map(torch.equal, one, five))


# of one sample: fewer than a run, one run, two and none over, two and some over; and its tasks' all
@pytest.mark.parametrize("T", [31, 32, 64, 75])
def test_no_token_is_left_out_of_a_sum(T):
    x, h, gate, *_ = inputs(70, T, 3)
    _, _, dh, dgate = with_grads(ops.gated_residual, x, h, gate)
    dy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    torch.testing.assert_close(dgate.double(), (dy * h).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh.double(), dy * gate[:, None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 30_000, 4), (70, 2500, 3)], ids=str)
def test_a_sum_over_many_tokens_keeps_its_last_digits(shape):
    x, h, gate, *_ = inputs(*shape)
    leaf = gate.clone().requires_grad_()
    dy = 1 + torch.rand_like(x)
    (dgate,) = torch.autograd.grad(ops.gated_residual(x, 1 + h**2, leaf), leaf, dy)
    exact = (dy.double() * (1 + h**2).double()).sum(1)
    torch.testing.assert_close(dgate.double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("D", [5, 384, 1153])
def test_a_mean_of_10000_units_costs_no_more_than_in_eager(D, norm):
    x, _, _, scale, shift = inputs(2, 9, D)
    args = 1e4 + x, scale, shift
    actual, eager, exact = (
        with_grads(lambda *args, op=op: op(*args, norm=norm), *given)
        for op, given in [
            (ops.adaln_norm, args),
            (reference.adaln_norm, args),
            (reference.adaln_norm, [a.double() for a in args]),
        ]
    )
    for name, *results in zip(["y", "dx", "dscale", "dshift"], actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(value):
    x, h, gate, scale, shift = inputs(2, 9, 40)
    clean = ops.gated_adaln_norm(x, h, gate, scale, shift)
    x[1, 4, 17] = value
    for before, after in zip(clean, ops.gated_adaln_norm(x, h, gate, scale, shift), strict=True):
        assert not after[1, 4].isfinite().all()
        after[1, 4] = before[1, 4]
        assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 7, 8, 33, 65])
def test_nothing_past_a_tensor_is_written(D, dtype):
    """Parts of larger buffers, as a caller of the raw ops may pass them."""
    buffers = []

    def out(*shape, dtype=dtype):
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 64,), 2.0**14, dtype=dtype))
        return buffers[-1][32:-32].view(shape)

    x, h, gate, scale, shift = (a.to(dtype) for a in inputs(2, 11, D))
    y, stats, table = out(2, 11, D), out(2, 11, 2, dtype=torch.float32), torch.ones(2, 11, D)
    raw.adaln_norm_fwd(x, scale, shift, y, stats, 1e-6, True)
    raw.gated_adaln_norm_fwd(x, h, gate, scale, shift, out(2, 11, D), y, stats, 1e-6, True)
    norm = x, scale, shift, stats, out(2, 11, D), out(2, 11, D), out(2, D), out(2, D), True
    raw.adaln_norm_bwd(y, h, *norm)
    outs = *(out(2, 11, D) for _ in range(3)), *(out(2, D) for _ in range(3))
    raw.gated_adaln_norm_bwd(y, h, x, h, gate, scale, shift, stats, *outs, True)
    raw.gated_residual_fwd(x, h, gate, out(2, 11, D))
    raw.gated_residual_bwd(x, h, gate, out(2, 11, D), out(2, D))
    rows, bias, float32 = x.view(22, D), gate[0], torch.float32
    raw.gelu_fwd(rows, bias, out(22, D))
    raw.gelu_bwd(rows, rows, bias, out(22, D), out(22, D), out(D, dtype=float32))
    wide, wide_bias = torch.cat([rows, rows], 1), torch.cat([bias, bias])
    raw.swiglu_fwd(wide, wide_bias, out(22, D))
    raw.swiglu_bwd(wide, rows, wide_bias, out(22, 2 * D), out(22, D), out(2 * D, dtype=float32))
    qkv, dqkv = torch.cat([x, h, x], -1), out(2, 11, 3 * D).zero_()
    raw.qk_norm_rotary_fwd(qkv, bias, bias, table, out(2, 11, 2, 1, D), 1, 1e-6)
    raw.qk_norm_rotary_bwd(dqkv, qkv, bias, bias, table, out(D), out(D), 1, 1e-6)
    assert not dqkv[..., 2 * D :].any()
    for buffer in buffers:
        assert (buffer[:32] == 2**14).all() and (buffer[-32:] == 2**14).all()
        assert (buffer[32:-32] != 2**14).all()
