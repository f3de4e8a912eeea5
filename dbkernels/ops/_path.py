"""The path of a GPU, taken with the fake tensors of a CPU: what a prediction of memory runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_processors: list[int] = []  # of the GPU that is rehearsed, innermost last


def takes_gpu_path(tensor: Tensor) -> bool:
    """Whether to do as on a GPU, where it and a CPU have different ways."""
    return tensor.is_cuda or bool(_processors)


def rehearsed_processors() -> int | None:
    """Streaming multiprocessors of the GPU that is rehearsed; None where there is none."""
    return _processors[-1] if _processors else None


@contextmanager
def rehearse_gpu(processors: int) -> Iterator[None]:
    """Do with a CPU's fake tensors as on a GPU with so many streaming multiprocessors."""
    _processors.append(processors)
    try:
        yield
    finally:
        _processors.pop()
