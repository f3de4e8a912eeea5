import os

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is imported, so it must be set before anything here imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.repair()


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Same numbers every run, and NaN in every buffer that is read before it is written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
