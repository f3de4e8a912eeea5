"""Rows of an array in a file, read when they are asked for.

Nothing is mapped: a mapped file that becomes shorter ends the process that reads it. Here a read
past its end is an error of one sentence.
"""

import copy
import math
import os
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np


class _Opened:
    """A file that is open for as long as this is; rows in another order share it."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        # for a process that is begun with it; there another file may have this number
        return _taken_over, (DupFd(self.number),)

    def __del__(self) -> None:
        os.close(self.number)


def _opened(path: str | Path) -> _Opened:
    return _Opened(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _taken_over(handed_over: Any) -> _Opened:
    # of a class that each way to begin a process has of its own
    return _Opened(handed_over.detach())


class RowsOnDisk:
    """`Images` that stay in their file, which stays open: a file that takes its name is not read.

    Args:
        path:        of the file
        shape:       (N, ...)
        dtype:       of numbers
        offset:      bytes before row 0
        step_bytes:  from one row to the next; None where they follow one another
        fortran:     whether the first axis changes fastest, so that a row lies in many pieces
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        offset: int = 0,
        step_bytes: int | None = None,
        fortran: bool = False,
    ):
        self.path, self.shape, self.dtype, self.offset = path, shape, np.dtype(dtype), offset
        self._row, self._axes, self._fortran = shape[1:], tuple(range(len(shape))), fortran
        self._row_bytes = math.prod(self._row) * self.dtype.itemsize
        self._step_bytes = self._row_bytes if step_bytes is None else step_bytes
        self._file = _opened(path)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def transpose(self, *axes: int) -> "RowsOnDisk":
        """The same rows with their axes in another order; the first is 0."""
        other = copy.copy(self)
        other.shape = tuple(self.shape[axis] for axis in axes)
        other._axes = tuple(self._axes[axis] for axis in axes)
        return other

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows by their numbers, of which there are B: (B, ...).

        Raises:
            ValueError: the file cannot be read, or has become too short.
        """
        if self._fortran:
            return self._gathered(rows).transpose(self._axes)
        return self._read(rows, self._row).transpose(self._axes)

    def runs(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Rows that follow one another, so many from each of B on: (B, length, ...).

        The axes are those of the file, whose rows leave no space between them.

        Raises:
            ValueError: as above.
        """
        assert not self._fortran and self._step_bytes == self._row_bytes
        return self._read(starts, (length, *self._row))

    def _read(self, rows: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of a shape from each of the rows on."""
        stored = np.empty((len(rows), *shape), self.dtype)
        places = stored.view(np.uint8).reshape(len(rows), math.prod(shape) * self.dtype.itemsize)
        for place, row in zip(places, rows, strict=True):
            self._fill(place, self.offset + int(row) * self._step_bytes)
        return stored

    def _gathered(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of which every number lies elsewhere: it is read with those of all other rows."""
        column = np.empty(self.shape[0], self.dtype)
        found = np.empty((math.prod(self._row), len(rows)), self.dtype)
        for index, numbers in enumerate(found):
            self._fill(column.view(np.uint8), self.offset + index * column.nbytes)
            numbers[:] = column[np.asarray(rows)]
        return found.T.reshape((len(rows), *self._row), order="F")

    def _fill(self, place: np.ndarray, start: int) -> None:
        view = memoryview(place)
        while view:
            try:
                count = os.preadv(self._file.number, [view], start)
            except OSError as error:
                raise ValueError(f"{self.path} cannot be read: {error.strerror}") from error
            if not count:
                raise ValueError(
                    f"{self.path} was cut short while it was in use: it must have "
                    f"{start + len(view)} bytes, got {os.fstat(self._file.number).st_size}"
                )
            view, start = view[count:], start + count


def spaced(count: int, most: int) -> np.ndarray:
    """Numbers of evenly spaced rows, of so many: all of them, or so many at most."""
    kept = min(count, most)
    return np.arange(kept) * count // max(kept, 1)
