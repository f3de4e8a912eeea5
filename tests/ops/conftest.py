from contextlib import nullcontext

import pytest
import torch

from dbkernels.ops import use_implementation


@pytest.fixture(autouse=True)
def on_the_gpu_where_there_is_one():
    """Tensors of these tests are made where the kernels run; the interpreter takes CPU tensors."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture
def by_triton(rehearsed):
    """Tests marked gpu run Triton's kernels, which a CPU has to be asked for."""
    with use_implementation("triton") if rehearsed else nullcontext():
        yield
