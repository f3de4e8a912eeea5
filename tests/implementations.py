"""Which implementations of an op can run on this machine, for tests that go over all of them."""

import pytest
import torch

from dbkernels.ops.backend import library
from dbkernels.ops.backend.register import use_implementation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the tensors in tests/ops


def implementations(op: str) -> list[str]:
    """Triton and plain torch, and compiled code where it was built; op by name: add_noise_fwd."""
    compiled = [library.NAMES[DEVICE.type]] if library.serves(op, DEVICE) else []
    return ["triton", "torch", *compiled]


def thinned(op: str, names: str, cases: list[tuple]):
    """Each of them on all cases, but Triton, whose interpreter is slow, on every third."""
    every = {"triton": 3}
    rows = [(name, *case) for name in implementations(op) for case in cases[:: every.get(name, 1)]]
    names = ["implementation", *names.split()]
    return pytest.mark.parametrize(names, rows, indirect=names[:1], ids=str)


def each_implementation(op: str, *, autouse: bool = False):
    """A fixture by which each of them runs a test."""

    @pytest.fixture(params=implementations(op), autouse=autouse)
    def implementation(request):
        with use_implementation(request.param):
            yield request.param

    return implementation
