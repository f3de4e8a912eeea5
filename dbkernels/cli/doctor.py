"""`python -m dbkernels doctor`."""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from rich.table import Table

import dbkernels
from dbkernels.cli.table import Row, show, table
from dbkernels.ops.backend import library, register, toolchain

WITHOUT_C = """
Triton needs a C compiler when a kernel first runs, and there is none: no op
runs in Triton on a GPU. Install one, such as gcc, or name it by CC."""


@dataclass(frozen=True)
class Doctor:
    """Say what runs the ops here, what is missing for more, and the command that adds it."""

    json: bool = False
    """Print one JSON object instead of a screen."""

    def run(self) -> None:
        report = examine()
        show([report], screen(report), as_json=self.json)
        if report["library"]["broken"]:
            sys.exit(1)


def examine() -> Row:
    """Everything that the screen says, as one JSON object."""
    reason, broken, manifest = library.library()
    gpu, nvcc = _gpu(), toolchain.nvcc()
    could_serve = reason is not None or bool(gpu and gpu["reason"] and nvcc)
    return {
        "dbkernels": dbkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": gpu,
        "compiler": _version(toolchain.compiler()),
        "triton_compiler": _version(toolchain.c_compiler()),
        "nvcc": _version([nvcc] if nvcc else None),
        "library": {
            "loaded": reason is None,
            "reason": reason,
            "broken": broken,
            "architectures": [] if manifest is None else list(manifest.architectures),
            "fix": library.build_command() if could_serve else None,
        },
        "ops": {op: _implementations(op) for op in register.registered()},
    }


def screen(report: Row) -> Iterator[Table | str]:
    gpu, library = report["gpu"], report["library"]
    lines = {name: report[name] for name in ("dbkernels", "python", "torch", "triton")}
    lines["NVIDIA GPU"] = f"{gpu['name']}, sm_{gpu['sm']}" if gpu else "none"
    tools = {"C compiler": "triton_compiler", "C++ compiler": "compiler", "nvcc": "nvcc"}
    lines |= {name: report[key] or "none" for name, key in tools.items()}
    names = ", ".join(f"sm_{arch}" for arch in library["architectures"])
    words = f"loaded, for CPUs and {f'for GPUs of {names}' if names else 'for no GPU'}"
    if not library["loaded"]:
        words = f"{'broken: ' if library['broken'] else ''}{library['reason']}"
    lines["compiled library"] = words
    if gpu and gpu["reason"] and library["loaded"]:
        lines[""] = f"Nothing of it serves the GPU: {gpu['reason']}"
    yield "\n".join(f"{name:<18}{value}" for name, value in lines.items())
    if report["triton_compiler"] is None:
        yield WITHOUT_C
    if not library["loaded"]:
        on_gpu = " and in Triton on a GPU" if report["triton_compiler"] else ""
        yield f"\nWithout the library every op runs in plain torch on a CPU{on_gpu}."
    if library["fix"]:
        need = "" if report["compiler"] else " install a C++ compiler, such as g++, and then"
        yield f"To build it,{need} run:\n  {library['fix']}"
    columns = ("op", "on a CPU", "on a GPU" if gpu else "on a GPU, if there were one")
    yield table(columns, _ops(report), names=3)


def _ops(report: Row) -> Iterator[tuple[str, ...]]:
    """An op, and what runs its forward and its backward."""
    rows: dict[str, list[dict[str, str]]] = {}
    for name, where in report["ops"].items():
        rows.setdefault(re.sub("_[fb]wd$", "", name), []).append(where)
    for op, directions in rows.items():
        cells = (dict.fromkeys(where[device] for where in directions) for device in ("cpu", "cuda"))
        yield op, *(", backward ".join(cell) for cell in cells)


def _implementations(op: str) -> dict[str, str]:
    if_there_were = not torch.cuda.is_available() and library.has_kernel(op, "cuda")
    cuda = "cuda" if if_there_were else register.implementation("cuda", op)
    return {"cpu": register.implementation("cpu", op), "cuda": cuda}


def _gpu() -> Row | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "sm": f"{major}{minor}",
        "reason": library.cuda_reason(torch.device("cuda")),
    }


def _version(command: list[str] | None) -> str | None:
    """A compiler's command and the version that it states."""
    if command is None:
        return None
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    found = re.search(r"\b\d+\.\d+(\.\d+)?", done.stdout)
    return f"{shlex.join(command)} {found[0] if found else 'of an unknown version'}"
