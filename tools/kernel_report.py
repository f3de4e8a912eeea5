"""What the compiler makes of every kernel of dbkernels/ops, for GPUs that need not be here.

Triton's are compiled anew; CUDA's are read from the compiled library, where nvcc has built it.
Ends with 1 where a kernel spills registers to memory, or moves rows of bfloat16 in accesses of less
than 16 bytes.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal
from unittest import mock

import torch
import tyro
from kernel_cases import CASES, DTYPE, B, Case, Shapes, T
from kernel_compile import (
    PROCESSORS,
    bytes_moved,
    compile_launch,
    library_rows,
    record,
    row_arguments,
)
from rich.table import Table

from dbkernels.cli.table import plain_console
from dbkernels.ops.backend.tile import MAX_D, programs_per_processor
from dbkernels.pool import processes

Row = dict[str, object]
LIBRARY = "library"  # among the kernels, for all of CUDA
# peak memory bandwidth in bytes/s, from the makers' data sheets
PEAK = {
    "A100-SXM4-80GB": 2039e9,
    "H100-SXM5-80GB": 3350e9,
    "H200-SXM-141GB": 4800e9,
    "B200-SXM": 8000e9,
}

BATCHES = (8, 32, 64, 128, 256)  # samples
# how kernels call the rows, or tokens, of a program
SHARES = ("rows_per_program", "tokens_per_program")

HEADERS = {  # of columns that are not called as their field
    "num_warps": "warps",
    "programs_per_processor": "fit",
    "widest_load_bytes": "load",
    "widest_store_bytes": "store",
    "row_access_bytes": "row",
    "hbm_bytes": "moved",
}
BY_KEY = {"wave_efficiency": "{:.2f}", "floor_us": "{:.1f}"}  # columns that are several


@dataclass(frozen=True)
class Options:
    """Compile the kernels and report registers, spills, memory accesses and bytes moved."""

    # such as adaln_norm_fwd; library is every CUDA kernel, for each arch that it was built for
    kernel: tuple[str, ...] = (*CASES, LIBRARY)
    arch: tuple[Literal[80, 90, 100], ...] = (80, 90, 100)  # 10 times the compute capability
    D: tuple[int, ...] = (128, 384, 768, 1024, 1152, 1536, 4096, 5120)  # model widths
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        if not (self.kernel and self.arch and self.D):
            raise ValueError("give at least one kernel, arch and D, or leave the option out")
        for name in self.kernel:
            if name not in (*CASES, LIBRARY):
                raise ValueError(f"kernel must be one of {', '.join(CASES)}, {LIBRARY}, got {name}")
        for D in self.D:
            if not 1 <= D <= MAX_D:
                raise ValueError(f"D must be 1 to {MAX_D}, got {D}")
            for name in self.of_triton():
                if D % CASES[name].multiple:
                    raise ValueError(
                        f"D must be a multiple of {CASES[name].multiple} for {name}, got {D}"
                    )

    def of_triton(self) -> list[str]:
        return [name for name in self.kernel if name != LIBRARY]


def rows_of(task: tuple[str, int], widths: tuple[int, ...]) -> list[Row]:
    """The rows of one kernel for one architecture; many widths compile to the same code."""
    name, arch = task
    return [row_of(name, arch, D, stream) for D in widths for stream in CASES[name].streams]


def row_of(name: str, arch: int, D: int, stream: torch.dtype) -> Row:
    case, shapes = CASES[name], Shapes(D, stream=stream)
    kernel, launch = record(case, shapes, arch)
    used, loads, stores = compile_launch(kernel, launch, arch)
    moved = bytes_moved(case, launch)
    # an argument whose accesses were not found counts as the narrowest
    narrow = [
        min((*loads.get(n, ()), *stores.get(n, ())), default=0) for n in row_arguments(launch)
    ]
    fit = programs_per_processor(used["registers"], launch.num_warps)
    of_batch = {B: wave_efficiency(case, replace(shapes, B=B), arch, fit) for B in BATCHES}
    return {
        "kernel": name,
        "arch": arch,
        "dtype": _short(DTYPE),  # of the branches
        "stream": _short(stream),  # dtype of the residual stream
        "D": D,
        "num_warps": launch.num_warps,
        **used,
        "programs_per_processor": fit,  # that fit at once
        "wave_efficiency": {B: round(share, 3) for B, share in of_batch.items()},
        "widest_load_bytes": max(map(max, loads.values()), default=0),
        "widest_store_bytes": max(map(max, stores.values())),
        # the narrowest to a row of bfloat16 that 16 bytes divide, and what it has to reach
        "row_access_bytes": min(narrow, default=None),
        "least_access_bytes": case.access_bytes,
        "hbm_bytes": moved,  # at B and T of kernel_cases
        "floor_us": {product: round(1e6 * moved / rate, 2) for product, rate in PEAK.items()},
    }


def faults(row: Row) -> Iterator[str]:
    """Sentences on what is wrong with a kernel."""
    at = f" of a {row['stream']} stream at D = {row['D']}" if "D" in row else ""
    where = f"{row['kernel']}{at} on sm_{row['arch']}"
    if row["stack_bytes"] or row["local_bytes"]:
        yield (
            f"{where} spills registers: {row['stack_bytes']} bytes of stack and "
            f"{row['local_bytes']} of local memory to a thread"
        )
    narrowest = row.get("row_access_bytes")
    if narrowest is not None and narrowest < row["least_access_bytes"]:
        yield (
            f"{where} reads or writes rows in {narrowest} bytes at a time, "
            f"where {row['least_access_bytes']} are possible"
        )


def wave_efficiency(case: Case, shapes: Shapes, arch: int, fit: int) -> float:
    """How evenly a launch fills a device, from 0 to 1: what its programs do, over what it could.

    Programs start in waves, as many at a time as fit; in one wave that is not full, each processor
    has as near the same number as there can be. The device waits for the one that has most to do.

    Args:
        case:    the kernel
        shapes:  it is launched at
        arch:    10 times the compute capability
        fit:     programs that fit one processor
    """
    _, launch = record(case, shapes, arch)
    each = next((launch.arguments[name] for name in SHARES if name in launch.arguments), None)
    full = 1.0
    if each is not None and "segments" not in launch.arguments:
        # the last program may have fewer rows than the others
        rows = shapes.B * T
        full = rows / (each * -(-rows // each))
    return full * launch.programs / (PROCESSORS[arch] * _load(launch.programs, arch, fit))


def _load(programs: int, arch: int, fit: int) -> int:
    """Programs one after another and side by side on the processor that has most."""
    count = PROCESSORS[arch]
    if programs <= fit * count:
        return -(-programs // count)
    return fit * -(-programs // (fit * count))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report(options: Options) -> Iterator[Row]:
    """Rows in the order of the options, compiled by as many processes as there are cores."""
    tasks = [(name, arch) for name in options.of_triton() for arch in options.arch]
    with processes(len(os.sched_getaffinity(0))) as pool:
        # a worker imports the kernels anew, and what is for the interpreter cannot be compiled
        with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
            results = pool.map(partial(rows_of, widths=options.D), tasks)
        for rows in results:
            yield from rows


def table(rows: Sequence[Row], title: str) -> Table:
    """A line to a row; what is by number of samples or by product has a column to each."""
    table = Table(title=title)
    for column in _cells(rows[0]):
        table.add_column(column, no_wrap=column == "kernel")
    for row in rows:
        table.add_row(*_cells(row).values())
    return table


def _cells(row: Row) -> dict[str, str]:
    left_out = ("dtype", "least_access_bytes", *BY_KEY)
    shown = {n: v for n, v in row.items() if n not in left_out} | {"arch": f"sm_{row['arch']}"}
    cells = {HEADERS.get(n, n.removesuffix("_bytes")): str(v) for n, v in shown.items()}
    for name, text in BY_KEY.items():
        for key, value in row.get(name, {}).items():
            cells[f"B {key}" if name == "wave_efficiency" else key.partition("-")[0]] = text.format(
                value
            )
    return cells


def main() -> None:
    options = tyro.cli(Options)
    rows, console = [], plain_console()
    console.width = 200
    for row in chain(report(options), library_rows() if LIBRARY in options.kernel else ()):
        rows.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    of_triton = f"{_short(DTYPE)}, B = {B}, T = {T}; bytes, shares of full waves, floors in µs"
    for has_width, title in ((True, of_triton), (False, "CUDA kernels of the compiled library")):
        of_kind = [row for row in rows if ("D" in row) == has_width]
        if of_kind and not options.json:
            console.print(table(of_kind, title))
    found = [fault for row in rows for fault in faults(row)]
    print("".join(f"{fault}\n" for fault in found), end="", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
