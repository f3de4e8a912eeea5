"""The compiled library of csrc: whether it serves, and if not, why.

It is loaded when an op first asks for it. It must have been built from the sources that stand
beside it, where they do: the build writes a manifest into it, which is read without loading.
"""

import platform
import re
import shlex
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dbkernels.ops.backend import toolchain

PATH = Path(__file__).parents[1] / "libdbkernels.so"
CSRC = Path(__file__).parents[3] / "csrc"
# of what it offers on a device
NAMES: dict[str, Literal["cpp", "cuda"]] = {"cpu": "cpp", "cuda": "cuda"}
_MANIFEST = re.compile(rb"dbkernels csrc=([0-9a-f]{64})(?: cuda=(\d+)\.\d+ sm=([\d,]+))?;")


class Manifest(NamedTuple):
    """What the library was built from, and for."""

    csrc: str  # digest of the sources
    cuda: int  # major version of the CUDA runtime; 0 where it was built without nvcc
    architectures: tuple[int, ...]  # 10 times the compute capability


class Library(NamedTuple):
    """The library as this process has it."""

    reason: str | None  # why it does not serve; None where it does
    broken: bool = False  # it is there, and nothing about the machine forbids it
    manifest: Manifest | None = None  # None where it is not there


@cache
def library() -> Library:
    """Load the library, where it can serve."""
    if not PATH.exists():
        return Library(_note() or f"{PATH.name} was never built.")
    manifest = read_manifest(PATH)
    if manifest is None:
        return Library(f"{PATH.name} is not a library of dbkernels.", broken=True)
    if (CSRC / "library.cpp").exists() and manifest.csrc != toolchain.digest(CSRC):
        return Library(f"{PATH.name} was built from other sources than csrc.", True, manifest)
    if not processor_serves():
        return Library("This processor has no AVX2.", manifest=manifest)
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return Library(f"{PATH.name} does not load: {error}.", True, manifest)
    return Library(None, manifest=manifest)


@cache
def cuda_reason(device: torch.device) -> str | None:
    """Why the library has nothing for this GPU, or None where it has."""
    if not torch.cuda.is_available():
        return "There is no NVIDIA GPU."
    reason, _, manifest = library()
    if reason is not None:
        return reason
    if not manifest.cuda:
        return _note() or f"{PATH.name} was built without nvcc."
    # a driver runs what was built with its own major version of CUDA, and with older ones
    driver = torch._C._cuda_getDriverVersion() // 1000
    if driver < manifest.cuda:
        return f"{PATH.name} needs a driver of CUDA {manifest.cuda}, got one of CUDA {driver}."
    major, minor = torch.cuda.get_device_capability(device)
    if not any(10 * major <= arch <= 10 * major + minor for arch in manifest.architectures):
        names = ", ".join(f"sm_{arch}" for arch in manifest.architectures)
        return f"{PATH.name} was built for {names}, got a GPU of sm_{major}{minor}."
    return None


@cache
def serves(op: str, device: torch.device) -> bool:
    """Whether the library has a kernel of an op for a device."""
    if device.type == "cuda" and cuda_reason(device) is not None:
        return False
    return device.type in NAMES and has_kernel(op, device.type)


def has_kernel(op: str, kind: Literal["cpu", "cuda"]) -> bool:
    """Whether the library has a kernel of an op for some device of a kind."""
    name = f"dbkernels_compiled::{op}"
    return library().reason is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, kind.upper()
    )


def build_command() -> str | None:
    """The line for a shell that builds the library; None where the processor could not run it."""
    if not processor_serves():
        return None
    python, checkout = (shlex.quote(str(path)) for path in (sys.executable, CSRC.parent))
    build = f"cd {checkout} && {python} setup.py build_ext --inplace"
    if not (CSRC / "library.cpp").exists():
        # pip keeps wheels, and one without the library would serve again
        options = "--no-build-isolation --no-deps --no-cache-dir --force-reinstall"
        build = f"{python} -m pip install {options} path/to/the/checkout"
    if find_spec("ninja") and find_spec("setuptools"):
        return build
    return f"{python} -m pip install ninja 'setuptools>=77' && {build}"


@cache
def warn_where_missing() -> None:
    """Say, once in a process, that a CPU is without the library, and the line that adds it."""
    command = build_command()
    if library().reason is not None and command is not None:
        warnings.warn(
            f"{library().reason} On a CPU dbkernels runs in plain torch, which is slower. To build "
            f"the library, run: {command}",
            stacklevel=2,
        )


def processor_serves() -> bool:
    """Whether the processor has the instructions that the library is compiled for."""
    return platform.machine() != "x86_64" or torch.cpu._is_avx2_supported()


def read_manifest(path: Path) -> Manifest | None:
    """What the build wrote into a library; None in a file that it did not make."""
    found = _MANIFEST.search(path.read_bytes())
    if found is None:
        return None
    csrc, cuda, architectures = found.groups()
    numbers = tuple(map(int, architectures.split(b","))) if architectures else ()
    return Manifest(csrc.decode(), int(cuda or 0), numbers)


def _note() -> str | None:
    """Why the build left something out, in its own words; the line after says what that costs."""
    note = PATH.with_suffix(".txt")
    return note.read_text().partition("\n")[0] or None if note.exists() else None
