"""What nvcc made of every CUDA kernel of the compiled library, read from the library itself."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from kernel_compile import USAGE, cuobjdump, spills

from dbkernels.ops.backend import library

_ARCH = re.compile(r"^arch = sm_(\d+)")
_FUNCTION = re.compile(r"^ Function (\w+):")
_NAMESPACES = re.compile(r"(?:\w+|\(anonymous namespace\))::")


@dataclass(frozen=True)
class LibraryRow:
    """One CUDA kernel for one architecture."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    def faults(self) -> Iterator[str]:
        yield from spills(f"{self.kernel} on sm_{self.arch}", self.stack_bytes, self.local_bytes)


def library_rows() -> list[LibraryRow]:
    """By kernel and architecture; none where the library does not serve or is without CUDA."""
    loaded = library.library()
    if loaded.reason is not None or not loaded.manifest.cuda:
        return []
    return sorted(read_usage(cuobjdump(library.PATH)), key=lambda row: (row.kernel, row.arch))


def read_usage(text: str) -> Iterator[LibraryRow]:
    """The rows of what cuobjdump prints, which has one section to an architecture."""
    arch = name = None
    for line in text.splitlines():
        if found := _ARCH.match(line):
            arch = int(found[1])
        elif found := _FUNCTION.match(line):
            name = short_name(found[1])
        elif name and (found := USAGE.search(line)):
            registers, stack, shared, local = map(int, found.groups())
            yield LibraryRow(name, arch, registers, stack, local, shared)
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
