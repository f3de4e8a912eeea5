"""Fake tensors of a CPU on which ops run as on a GPU: what a prediction of memory runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_processors: list[int] = []  # of the GPU of a dry run, innermost last


def runs_as_on_gpu(tensor: Tensor) -> bool:
    """Whether to do as on a GPU, where it and a CPU have different ways."""
    return tensor.is_cuda or bool(_processors)


def dry_run_processors() -> int | None:
    """Streaming multiprocessors of the GPU of a dry run; None where there is none."""
    return _processors[-1] if _processors else None


@contextmanager
def dry_run_on_gpu(processors: int) -> Iterator[None]:
    """Do with a CPU's fake tensors as on a GPU with so many streaming multiprocessors."""
    _processors.append(processors)
    try:
        yield
    finally:
        _processors.pop()
