"""What csrc is built from and with.

In Python's own library alone, because setup.py runs this file where torch may be missing.
"""

import hashlib
import os
import shlex
import shutil
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
CC = ("gcc", "clang")  # Triton's order
CXX = ("c++", "g++", "clang++")


def digest(csrc: Path) -> str:
    """A hash of all sources, by which a library is known that was built from others."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in csrc.iterdir() if path.suffix in SUFFIXES):
        text = path.read_bytes()
        hashed.update(f"{path.name} {len(text)} ".encode() + text)
    return hashed.hexdigest()


def compiler() -> list[str] | None:
    """The C++ compiler's command: that of CXX, else the first on PATH; None where there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in CXX]:
        if shutil.which(command[0]):
            return command
    return None


def c_compiler() -> list[str] | None:
    """The C compiler that Triton calls at run time: that of CC, else the first of its own list."""
    given = os.environ.get("CC")
    return next(([name] for name in ([given] if given else CC) if shutil.which(name)), None)


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME where that is set, else on PATH or at its usual place."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
