import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_gpu_where_there_is_one():
    """Tensors of these tests are made where the kernels run; the interpreter takes CPU tensors."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
