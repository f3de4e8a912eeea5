"""What compiled code for a CPU has beside what its ops promise: threads, and long sums."""

import pytest
import torch
from accuracy import assert_op_is_accurate, with_grads
from threads import with_threads

from dbkernels import ops
from dbkernels.ops import reference
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, normals, uniforms

DRAW = Draw(seed=2**64 - 9, step=2**40 + 3, sample=2**32 - 40)


@pytest.fixture(autouse=True)
def compiled():
    with use_implementation("cpp"):
        yield


def inputs(B, T, D):
    """x, h, gate, scale and shift."""
    modulation = torch.randn(B, 6 * D).chunk(6, dim=1)
    return 3 + torch.randn(B, T, D), torch.randn(B, T, D), *modulation[:3]


def every_sum(x, h, gate, scale, shift):
    """Every op with sums over tokens, of one sample and of all."""
    x, y = ops.gated_adaln_norm(x, h, gate, scale, shift)
    y = ops.adaln_norm(ops.gated_residual(x, y, gate), scale, shift)
    y = ops.gelu(y, shift[0]) + ops.swiglu(torch.cat([y, x], -1), torch.cat([gate[0], shift[0]]))
    even = 3 * (y.shape[-1] // 6 * 2)
    norms = {"q_weight": gate[0, : even // 3], "k_weight": scale[0, : even // 3]}
    return *ops.qk_norm_rotary(y[..., :even], 1, **norms), y


def of_rows(shape, dims):
    args = inputs(*shape)
    return [lambda: with_grads(every_sum, *args)]


def of_noise(shape, dims):
    prediction, z0, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3
    few, (a, b) = slice(40), torch.rand(2, *shape[:dims])
    options = {"weight": b[few], "mask": mask[few], "reduction": "none"}

    def noisy(prediction, z0):
        loss, _ = ops.score_loss(prediction, z0, a[few], b[few], DRAW, **options)
        return ops.add_noise(z0, a[few], b[few], DRAW), loss

    draw = Draw(1, 2, 3)
    return [
        lambda: with_grads(noisy, prediction[few], z0[few]),
        lambda: [normals(draw, *shape), uniforms(draw, *shape), uniforms(draw, 40000)],
    ]


# each is worth several threads; 257 and 5001 begin rows, and so vectors, at odd addresses
@pytest.mark.parametrize(
    ("make", "shape", "dims"),
    [
        *((of_rows, shape, 0) for shape in [(3, 171, 257), (65, 9, 180), (1, 3000, 33)]),
        *((of_noise, shape, 1) for shape in [(20000, 3), (13, 5001), (1, 70000)]),
        *((of_noise, shape, 2) for shape in [(20000, 3), (13, 5001), (1, 70000)]),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(make, shape, dims):
    for f in make(shape, dims):
        one, two, five = (with_threads(count, f) for count in (1, 2, 5))
        assert all(map(torch.equal, one, two)) and all(map(torch.equal, one, five))


# of one sample: fewer than a run, one run, two and none over, two and some over; and its tasks' all
@pytest.mark.parametrize("T", [31, 32, 64, 75])
def test_no_token_is_left_out_of_a_sum(T):
    args = inputs(70, T, 3)[:3]
    assert_op_is_accurate(ops.gated_residual, reference.gated_residual, args, floor=1e-5)


@pytest.mark.parametrize("shape", [(1, 30_000, 4), (70, 2500, 3)], ids=str)
def test_a_sum_over_many_tokens_keeps_its_last_digits(shape):
    x, h, gate, *_ = inputs(*shape)
    leaf, dy = gate.clone().requires_grad_(), 1 + torch.rand_like(x)
    (dgate,) = torch.autograd.grad(ops.gated_residual(x, 1 + h**2, leaf), leaf, dy)
    exact = (dy.double() * (1 + h**2).double()).sum(1)
    torch.testing.assert_close(dgate.double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("D", [5, 384, 1153])
def test_a_mean_of_10000_units_costs_no_more_than_in_eager(D, norm):
    x, _, _, scale, shift = inputs(2, 9, D)
    both = (lambda *args, f=f: f(*args, norm=norm) for f in (ops.adaln_norm, reference.adaln_norm))
    assert_op_is_accurate(*both, (1e4 + x, scale, shift))


# one weight, and as many as elements
@pytest.mark.parametrize("per", [1, 200_000])
def test_the_loss_of_many_tiles_is_as_exact_as_float32(per):
    prediction, z0 = 3 + torch.randn(2, 200_000), torch.zeros(2, 200_000)
    one = torch.ones(2, per).squeeze(1)
    _, losses = ops.score_loss(prediction, z0, one, 0.4 * one, DRAW, weight=one)
    noise = normals(DRAW, 2, 200_000).double()
    exact = (prediction.double() - 0.4 * noise).square().mean(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-7, atol=0)
