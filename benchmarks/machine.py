"""Where a benchmark ran, and how fast that machine copies and multiplies.

Where the code travels without git, DBKERNELS_COMMIT says what it is, as `commit` would.
"""

import os
import platform
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import measure
import torch
import triton

ROOT = Path(__file__).parents[1]
COPY_BYTES = 2**28
MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of both factors
ROUNDS = 7
CEILINGS = ("copy_gbps", "matmul_tflops")


def machine(device: torch.device) -> dict[str, object]:
    """What a figure depends on beside the case, as a row has it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "driver": driver(device),  # of the GPU
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),  # ends with +dirty where tracked or new files differ from it
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found.group(1).strip() if found else platform.machine()


def folder_name(device: torch.device) -> str:
    """The device's name as a folder's: small letters and digits, with - between."""
    return "-".join(re.findall(r"[a-z0-9]+", device_name(device).lower()))


def driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    query = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output("nvidia-smi", *query) or "").partition("\n")[0] or None


def commit() -> str | None:
    """Of the checkout; what DBKERNELS_COMMIT says where there is no git; None where it is unset.

    Raises:
        ValueError: DBKERNELS_COMMIT is no commit.
    """
    # a checkout that lies within another's would be given the other's
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():
        told = os.environ.get("DBKERNELS_COMMIT", "")
        if told and not re.fullmatch(r"[0-9a-f]{7,40}(\+dirty)?", told):
            raise ValueError(f"DBKERNELS_COMMIT must be a commit such as 1a2b3c4, got {told!r}")
        return told or None
    name = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    # what a benchmark itself wrote says nothing about the code
    status = ["status", "--porcelain", "--", ".", ":!benchmarks/results"]
    changes = _output("git", "-C", str(ROOT), *status)
    return name and name + ("+dirty" if changes else "")


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches, by CEILINGS: copies of memory, and products of two matrices."""
    # larger than any cache
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = MATMUL[device.type]
    # numbers and not zeros, with which a GPU draws less power and runs faster
    random = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=random, dtype=dtype, device=device)
    calls = {"copy": partial(target.copy_, source), "matmul": partial(torch.mm, a, b)}
    times = measure.interleaved(calls, device=device, rounds=ROUNDS)
    copy, matmul = (times[key].median_ms / 1e3 for key in calls)
    rates = (2 * COPY_BYTES / copy / 1e9, 2 * size**3 / matmul / 1e12)  # read and written
    return dict(zip(CEILINGS, rates, strict=True))


def faster(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the device reached at either of two times: at one, others may have kept it busy."""
    return {name: max(rate, after[name]) for name, rate in before.items()}


def _output(program: str, *arguments: str) -> str | None:
    """None where the program is missing or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
