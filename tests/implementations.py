"""Which implementations of an op can run on this machine, for tests that go over all of them."""

import torch

from dbkernels.ops.backend import library

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the tensors in tests/ops


def implementations(op: str) -> list[str]:
    """Triton and plain torch, and compiled code where it was built; op by name: add_noise_fwd."""
    compiled = [library.NAMES[DEVICE.type]] if library.serves(op, DEVICE) else []
    return ["triton", "torch", *compiled]
