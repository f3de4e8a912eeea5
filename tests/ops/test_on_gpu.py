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
