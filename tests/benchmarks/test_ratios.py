"""The compiled kernels of a CPU against plain torch, by ratios alone: a busy machine slows both.

Each floor is far below what an idle machine gives.
"""

from functools import partial
from time import perf_counter

import pytest
import torch

from dbkernels import ops
from dbkernels.ops import reference

CPU = torch.device("cpu")
B, T, D = 4, 256, 384


@pytest.fixture(autouse=True)
def one_thread_without_poison():
    """Filling what is read later takes time of its own; a second thread may have no core."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def times_faster(benchmark):
    """Times one call by pytest-benchmark and another between its rounds; ratio of the fastest."""

    def run(fused, eager, rounds):
        seconds = []

        def time_eager():
            begin = perf_counter()
            eager()
            seconds.append(perf_counter() - begin)

        fused()
        benchmark.pedantic(fused, setup=time_eager, rounds=rounds)
        ratio = min(seconds[1:]) / benchmark.stats.stats.min
        benchmark.extra_info["times_faster"] = ratio
        return ratio

    return run


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def forward_and_backward(function, inputs):
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return torch.autograd.grad(outs, inputs, [out.detach() for out in outs])


def modulation(count):
    """As many slices of one projection, (B, D) each."""
    return [slice_.detach().requires_grad_() for slice_ in normal(B, count * D).chunk(count, -1)]


def test_noise_and_loss(bench, times_faster):
    case = bench("op_case").NoiseCase(
        "noise_and_loss", (64, 4, 64, 64), torch.float32, ("fused", "eager"), CPU
    )
    calls = case.calls([case.inputs()])
    (fused,), (eager,) = calls["fused", "fwd+bwd"], calls["eager", "fwd+bwd"]
    assert times_faster(fused, eager, rounds=120) >= 1.3


@pytest.mark.parametrize(
    ("name", "tensors", "slices", "floor"),
    [
        ("gated_adaln_norm", 2, 3, 1.2),
        ("adaln_norm", 1, 2, 1.2),
        ("gated_residual", 2, 1, 1.0),
    ],
)
def test_forward_and_backward(times_faster, name, tensors, slices, floor):
    inputs = [normal(B, T, D) for _ in range(tensors)] + modulation(slices)
    fused, eager = (
        partial(forward_and_backward, getattr(module, name), inputs) for module in (ops, reference)
    )
    # of so short a call the fastest is found late
    assert times_faster(fused, eager, rounds=1000) >= floor
