"""Files that are never seen half written, under a name that nobody could have taken before."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NAME_BYTES = 200  # of a file's own name in that of its temporary one: a name has 255 at most


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes its name when it is complete and on the disk.

    An older file of that name is replaced; a link of that name is, and not what it points to.
    After an error, or a crash at any moment, either the old one is there or the new one.

    Args:
        path:  of the file, in a directory that exists
    Returns:
        A context that gives the file to write to.
    """
    own = os.fsdecode(os.fsencode(path.name)[:NAME_BYTES])
    temporary = path.with_name(f".{own}-{secrets.token_hex(8)}")
    with new_file(temporary) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    make_durable(path.parent)


def new_file(path: Path) -> BinaryIO:
    """Open a file for writing that does not exist yet, nor a link of its name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_whole(path: Path, text: str) -> None:
    """Write a text as `whole_file` does, in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())


def make_directory(path: Path) -> None:
    """Make a directory and those that it lies in, where they are missing, all on the disk."""
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        make_durable(each.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))


def make_durable(path: Path) -> None:
    """Have what a file holds, or what a directory lists, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
