"""What an interpreter cannot show: compiled kernels at real sizes, far offsets, CUDA graphs."""

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.one_layer import OneLayer

from dbkernels import ops
from dbkernels.ops import RUNGS, reference

pytestmark = pytest.mark.gpu

B, T, D = 8, 256, 1152  # DiT-XL
BF16 = torch.bfloat16


def modulation(count):
    return (0.5 * torch.randn(B, 6 * D)).to(BF16).chunk(6, dim=-1)[:count]


def tokens(width=D):
    return (torch.randn(B, T, width) + 3).to(BF16)


def of_second_output(f):
    return lambda *args: f(*args)[1]


CASES = {
    "adaln_norm": lambda: (ops.adaln_norm, reference.adaln_norm, (tokens(), *modulation(2))),
    "gated_adaln_norm": lambda: (
        of_second_output(ops.gated_adaln_norm),
        of_second_output(reference.gated_adaln_norm),
        (tokens(), tokens(), *modulation(3)),
    ),
    "gated_residual": lambda: (
        ops.gated_residual,
        reference.gated_residual,
        (tokens(), tokens(), *modulation(1)),
    ),
    "gelu": lambda: (ops.gelu, reference.gelu, (tokens(4 * D), tokens(4 * D)[0, 0].clone())),
    "swiglu": lambda: (ops.swiglu, reference.swiglu, (tokens(6 * D), tokens(6 * D)[0, 0].clone())),
}


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_eager_at_a_real_size(name):
    op, specification, args = CASES[name]()
    assert ops.implementation(args[0].device) == "triton"
    actual, eager = with_grads(op, *args), with_grads(specification, *args)
    exact = with_grads(specification, *(a.double() for a in args))
    for i, results in enumerate(zip(actual, eager, exact, strict=True)):
        assert_as_accurate_as_eager(f"{name}, result {i}", *results)


def test_rows_past_two_to_the_31_elements():
    x = torch.zeros(2**21 + 8, 1, 1024, dtype=BF16)
    scale, shift = torch.zeros(2, 2**21 + 8, 1024, dtype=BF16)
    x[-1] = tokens(1024)[0, 0]
    y = ops.adaln_norm(x, scale, shift)
    assert torch.equal(y[-1], ops.adaln_norm(x[-1:], scale[-1:], shift[-1:])[0])
    assert not y[0].any()


@pytest.mark.parametrize("keep", RUNGS)
def test_a_captured_layer_replays_the_same_bits(keep):
    layer = OneLayer(2, 64, 384, 6, hidden=1536, dtypes=(BF16,) * 3)
    leaves = {name: tensor.requires_grad_() for name, tensor in layer.tensors.items()}

    def gradients():
        return torch.autograd.grad(layer.run(leaves, keep=keep).sum(), list(leaves.values()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, as a capture may not
        expected = [gradients() for _ in range(2)][-1]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    for actual, bits in zip(captured, expected, strict=True):
        assert torch.equal(actual, bits)


def noise_case(dtype):
    """A target, levels and a prediction of an odd size, on the GPU, and a draw near its limits."""
    shape = (5, 3, 1001)
    z0, prediction = ((0.5 * torch.randn(shape)).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.002, 0.3, 1.0, 9.0, 80.0])
    return z0, sigma, prediction, ops.Draw(seed=2**64 - 3, step=2**40 + 5, sample=2**32 - 5)


def noise_implementations():
    compiled = ops.implementation("cuda", "add_noise_fwd")
    return ["triton", *({compiled} - {"triton"})]


def test_a_gpu_draws_the_numbers_of_a_cpu():
    *_, draw = noise_case(BF16)
    expected = ops.normals(draw, 5, 3003, "cpu")
    for name in noise_implementations():
        with ops.use_implementation(name):
            actual = ops.normals(draw, 5, 3003, "cuda").cpu()
            uniform = ops.uniforms(draw, 5, "cuda").cpu()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        assert torch.equal(uniform, ops.uniforms(draw, 5, "cpu"))


def test_a_captured_step_draws_anew_at_each_replay():
    z0, sigma, prediction, _ = noise_case(BF16)
    step = torch.tensor(3)

    def drawn(step):
        draw = ops.Draw(seed=7, step=step, sample=8)
        loss, losses = ops.score_loss(prediction, z0, sigma, draw, sigma_data=0.5)
        noisy = ops.add_noise(z0, sigma, draw)
        return noisy, loss, losses, ops.normals(draw, 5, 3003, "cuda"), ops.uniforms(draw, 5)

    for name in noise_implementations():
        with ops.use_implementation(name):
            drawn(step)  # compiles the kernels, as a capture may not
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = drawn(step)
            for value in (3, 4, 2**40 + 5):
                step.fill_(value)
                graph.replay()
                for actual, expected in zip(captured, drawn(value), strict=True):
                    assert torch.equal(actual, expected), (name, value)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_noise_and_loss_on_a_gpu_are_those_of_plain_torch(dtype):
    z0, sigma, prediction, draw = noise_case(dtype)
    double = z0.double().cpu(), sigma.cpu(), prediction.double().cpu().requires_grad_()
    exact, _ = ops.score_loss(double[2], *double[:2], draw, sigma_data=0.5)
    (exact_grad,) = torch.autograd.grad(exact, double[2])
    noisy = ops.add_noise(double[0], double[1], draw, scale="c_in")
    for name in noise_implementations():
        with ops.use_implementation(name):
            scaled = ops.add_noise(z0, sigma, draw, scale="c_in")
            leaf = prediction.clone().requires_grad_()
            loss, _ = ops.score_loss(leaf, z0, sigma, draw, sigma_data=0.5)
            (grad,) = torch.autograd.grad(loss, leaf)
        eps = torch.finfo(dtype).eps
        for actual, expected in ((scaled, noisy), (loss, exact), (grad, exact_grad)):
            error = (actual.cpu().double() - expected).abs().max()
            assert error <= 2 * eps * expected.abs().max() + 1e-6, name
