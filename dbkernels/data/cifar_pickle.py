"""A file of CIFAR's python version: a pickle, of which nothing is called but what stands here.

A pickle names functions, which a reader calls with what the file says. Of those that this one may
name each has a stand-in here, which keeps what it is given, and any other is refused. numpy makes
an array of what was kept when its bytes are as many as its shape says.
"""

import math
import pickle
from pathlib import Path

import numpy as np

SHAPE = (3, 32, 32)  # of an image
# what a damaged pickle raises
DAMAGED = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


class _Array:
    """Of numpy's array of bytes: its shape, its dtype and the bytes themselves."""

    def __init__(self, *given: object):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def read(self) -> np.ndarray:
        """The array, uint8."""
        _, shape, dtype, in_fortran_order, raw = self.state
        if dtype.name not in ("u1", b"u1") or in_fortran_order or len(raw) != math.prod(shape):
            raise ValueError(f"expected an array of bytes, got {shape} of {dtype.name}")
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """Of numpy's dtype: its name."""

    def __init__(self, name: str | bytes = "", *given: object):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them for Python 2."""
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not called")
        return STAND_INS[module, name]


def read_pickled(path: Path, labels: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of a file, in memory.

    Args:
        labels:       their name in the file
        num_classes:  that they are below
    Raises:
        ValueError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    try:
        with path.open("rb") as file:
            found = _Reader(file, encoding="bytes").load()
        if not isinstance(found, dict):
            raise ValueError(f"expected a dictionary, got {type(found).__name__}")
        # Python 2 wrote bytes, and what Python 3 writes again may be text
        named = {name.decode() if isinstance(name, bytes) else name: found[name] for name in found}
        images, numbers = named["data"].read().reshape(-1, *SHAPE), named[labels]
        if len(numbers) != len(images):
            raise ValueError(f"{len(images)} images have {len(numbers)} labels")
        for number in numbers:
            if type(number) is not int or not 0 <= number < num_classes:
                raise ValueError(f"labels must be in [0, {num_classes}), got {number}")
    except DAMAGED as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no whole file of CIFAR's python version: {said}") from error
    return images, np.asarray(numbers, np.int64)
