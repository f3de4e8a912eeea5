"""Files that are never seen half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes its name when it is complete and on the disk.

    An older file of that name is replaced. After an error, or a crash at any moment, either the old
    one is there or the new one.

    Args:
        path:  of the file, in a directory that exists
    Returns:
        A context that gives the file to write to.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        make_durable(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text as `whole_file` does, in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())


def make_durable(path: Path) -> None:
    """Have what a file holds, or what a directory lists, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
