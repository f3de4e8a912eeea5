"""Losses, noise and random numbers on a GPU, against float64 and against a CPU."""

from functools import partial

import pytest
import torch
from captured import capture
from ops.logits import assert_gradient_is_accurate, assert_loss_is_accurate

from dbkernels import ops

pytestmark = pytest.mark.gpu

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("V", [1000, 50257])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.usefixtures("by_triton")
def test_the_gradient_of_softmax_is_as_accurate_as_eager(dtype, V, size):
    assert_gradient_is_accurate(*size((2048, V), (5, V % 97)), dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.usefixtures("by_triton")
def test_cross_entropy_is_as_accurate_as_eager(dtype, reduction, size):
    N, V, D = size((2048, 32000, 768), (9, 70, 12))
    args = 2 + torch.randn(N, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    target, weight = torch.randint(0, V, (N,)), 0.5 + torch.rand(N)
    target[1] = -100
    assert_loss_is_accurate([t.to(dtype) for t in args], target, weight, reduction=reduction)


def noise_case(dtype, dims=1):
    """A target, coefficients and a prediction of an odd size, and a draw near its limits."""
    shape = (5, 3, 1001)
    z0, prediction = ((0.5 * torch.randn(shape)).to(dtype) for _ in range(2))
    a, b = 4 * torch.randn(2, *shape[:dims])
    return z0, a, b, prediction, ops.Draw(seed=2**64 - 3, step=2**40 + 5, sample=2**32 - 5)


def noise_implementations(device):
    compiled = ops.implementation(device, "add_noise_fwd")
    return ["triton", *({compiled} - {"triton"})]


def test_a_gpu_draws_the_numbers_of_a_cpu(gpu):
    *_, draw = noise_case(BF16)
    with ops.use_implementation("torch"):
        expected = ops.normals(draw, 5, 3003, "cpu"), ops.uniforms(draw, 5, 77, device="cpu")
    for name in noise_implementations(gpu):
        with ops.use_implementation(name):
            actual = ops.normals(draw, 5, 3003, gpu).cpu()
            uniform = ops.uniforms(draw, 5, 77, device=gpu).cpu()
        torch.testing.assert_close(actual, expected[0], rtol=0, atol=1e-6)
        assert torch.equal(uniform, expected[1])


def test_a_captured_step_draws_anew_at_each_replay(gpu):
    z0, a, b, prediction, _ = noise_case(BF16)
    step = torch.tensor(3)

    def drawn(step):
        draw = ops.Draw(seed=7, step=step, sample=8)
        loss, losses = ops.score_loss(prediction, z0, a, b, draw)
        noisy, uniform = ops.add_noise(z0, a, b, draw), ops.uniforms(draw, 5, device=gpu)
        return noisy, loss, losses, ops.normals(draw, 5, 3003, gpu), uniform

    for name in noise_implementations(gpu):
        step.fill_(3)
        with ops.use_implementation(name):
            drawn(step)  # compiles the kernels, as a capture may not
            replay, captured = capture(partial(drawn, step), gpu)
            for value in (3, 4, 2**40 + 5):
                step.fill_(value)
                replay()
                for actual, expected in zip(captured, drawn(value), strict=True):
                    assert torch.equal(actual, expected), (name, value)


@pytest.mark.parametrize("dims", [1, 2])  # coefficients of samples, and of tokens
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_noise_and_loss_on_a_gpu_are_those_of_plain_torch(dtype, dims, gpu):
    z0, a, b, prediction, draw = noise_case(dtype, dims)
    options = {"weight": 0.5 + torch.rand(a.shape), "mask": torch.rand(5, 3) > 0.3}

    def by(name, z0, a, b, prediction, **options):
        leaves = prediction.detach().requires_grad_(), z0.detach().requires_grad_()
        with ops.use_implementation(name):
            noisy = ops.add_noise(z0, a, b, draw)
            loss, losses = ops.score_loss(*leaves, a, b, draw, **options)
            return noisy, losses, *torch.autograd.grad(loss, leaves)

    wide = (t.double() for t in (z0, prediction))
    wide = [next(wide).cpu(), a.cpu(), b.cpu(), next(wide).cpu()]
    exact = by("torch", *wide, **{name: t.cpu() for name, t in options.items()})
    for name in noise_implementations(gpu):
        for actual, expected in zip(by(name, z0, a, b, prediction, **options), exact, strict=True):
            error, eps = (actual.cpu().double() - expected).abs().max(), torch.finfo(dtype).eps
            assert error <= 2 * eps * expected.abs().max() + 1e-6, name
