"""What nvcc made of every CUDA kernel of the compiled library, read from the library itself."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache

from kernel_compile import cuobjdump, usage

from dbkernels.ops.backend import library

_ARCH = re.compile(r"^arch = sm_(\d+)")
_FUNCTION = re.compile(r"^ Function (\w+):")
_NAMESPACES = re.compile(r"(?:\w+|\(anonymous namespace\))::")


def library_rows() -> list[dict[str, object]]:
    """By kernel and architecture; none where the library does not serve or is without CUDA."""
    loaded = library.library()
    if loaded.reason is not None or not loaded.manifest.cuda:
        return []
    rows = read_usage(cuobjdump(library.PATH))
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def read_usage(text: str) -> Iterator[dict[str, object]]:
    """The rows of what cuobjdump prints, which has one section to an architecture."""
    arch = name = None
    for line in text.splitlines():
        if found := _ARCH.match(line):
            arch = int(found[1])
        elif found := _FUNCTION.match(line):
            name = short_name(found[1])
        elif name and (used := usage(line)):
            yield {"kernel": name, "arch": arch, **used}
            name = None


@cache
def short_name(symbol: str) -> str:
    """Without namespaces and arguments; the symbol itself where nothing here can read it."""
    if shutil.which("c++filt") is None:
        return symbol
    command = ["c++filt", symbol]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    text = _NAMESPACES.sub("", text).removeprefix("void ")
    # the arguments follow the name, or the > that ends its template's
    return re.match(r"\w+(?:<.*?>(?=\())?", text)[0]
