"""Every op with a kernel, forward and backward apart: its time and the bytes per second it reaches.

The op as a caller has it runs against the same in plain torch, and against what torch.compile makes
of that. The ops of a step's noise and loss compute their gradient in the forward, so both
directions are one call. One line or row is one implementation of one op in one direction:

    bytes_moved           each tensor that the op must read or write once
    achieved_gbps         bytes_moved over median_ms
    same_size_copy_gbps   of plain copies that move as many bytes, timed in the same rounds
    share_of_copy         the one over the other
    launches              that one graph has, each on inputs of its own; a time is their mean
    allocated_bytes       highest total of what one call allocates, beyond resident_bytes
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import measure
import torch
from command import called, parsed
from machine import ceilings, machine
from noise_case import PASSES, SHAPES, NoiseCase
from op_case import DTYPE, DTYPES, HEAD_DIM, INPUTS, STREAM, OpCase
from show import emit
from torch import Tensor

from dbkernels.cli.device import pick_device

Case = OpCase | NoiseCase

WIDTHS = {"cpu": (384,), "cuda": (384, 1024, 1152)}  # on a GPU those of DiT-S, L and XL
PROCESSES = 14
COPY = "copy"  # beside the implementations
ROUNDS = {"cpu": 11, "cuda": 50}


@dataclass(frozen=True)
class Options:
    """Time the ops, forward and backward apart, against plain torch and torch.compile.

    What is not given depends on the device.
    """

    op: tuple[str, ...] = (*INPUTS, *PASSES)  # such as adaln_norm
    dim: tuple[int, ...] = ()  # of the model; of the ops within a layer
    impls: tuple[Literal["fused", "eager", "compiled"], ...] = ("fused", "eager", "compiled")
    # of the residual stream: that of all else; or float32 beside bfloat16, of the ops that have one
    stream: tuple[Literal["same", "float32"], ...] = ("same",)
    samples: int | None = None  # of the noise's shapes, in place of 256
    rounds: int | None = None  # in each of which every implementation is timed once
    beside: bool = False  # first compile all kernels in other processes, for the cache on disk
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in self.op:
            if name not in INPUTS and name not in PASSES:
                raise ValueError(f"op must be one of {', '.join((*INPUTS, *PASSES))}, got {name}")
        for D in self.dim:
            if D < HEAD_DIM or D % HEAD_DIM:
                raise ValueError(f"dim must be a multiple of {HEAD_DIM}, got {D}")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        for name in ("threads", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        pick_device(self.device)

    def tables(self, device: torch.device) -> Iterator[list[Case]]:
        """The cases, by width and then by shape."""
        for D in self.dim or WIDTHS[device.type]:
            for mixed in (stream == "float32" for stream in self.stream):
                asked = [op for op in self.op if op in (STREAM if mixed else INPUTS)]
                yield [OpCase(op, D, self.impls, device, mixed) for op in asked]
        dtype = DTYPES[device.type]
        for samples, *rest in SHAPES:
            shape = (self.samples or samples, *rest)
            noise = (op for op in self.op if op in PASSES)
            yield [NoiseCase(op, shape, dtype, self.impls, device) for op in noise]


def rows_of(case: Case, rounds: int) -> Iterator[dict[str, object]]:
    """Rows by direction, and in it by implementation; what was compiled for one serves all."""
    # a function is recompiled for so many shapes only before it is left in plain torch
    torch.compiler.reset()
    moved = {direction: case.bytes_moved(direction) for direction in case.directions}
    count = measure.rotations(case.device, min(moved.values()))
    inputs = [case.inputs() for _ in range(count)]
    calls = case.calls(inputs)
    for direction in case.directions:
        competing = {impl: calls[impl, direction] for impl in case.impls}
        memory = {impl: weigh(case, each[0], inputs) for impl, each in competing.items()}
        competing[COPY] = measure.copies(case.device, moved[direction], count)
        times = measure.interleaved(competing, device=case.device, rounds=rounds)
        copy_gbps = moved[direction] / times.pop(COPY).median_ms / 1e6
        for impl, of in times.items():
            gbps = moved[direction] / of.median_ms / 1e6
            row = {"impl": impl, "op": case.op, "direction": direction}
            row |= {"implementation": case.implementation(impl, direction)}
            row |= {"shape": case.shape, "dtype": case.dtype_name}
            row |= asdict(of) | {"bytes_moved": moved[direction], "achieved_gbps": gbps}
            row |= {"same_size_copy_gbps": copy_gbps, "share_of_copy": gbps / copy_gbps}
            row |= {"launches": count, "allocated_bytes": memory[impl].peak_bytes}
            yield row | {"resident_bytes": memory[impl].resident_bytes}


def rows_that_can_be(
    cases: Sequence[Case], rounds: int, failed: list[str]
) -> Iterator[dict[str, object]]:
    """The rows of all cases but those that raise something, whose names are added to a list."""
    for case in cases:
        try:
            yield from rows_of(case, rounds)
        except Exception:  # whatever it is, the other ops are worth their minutes
            failed.append(f"{case.op} {case.shape}")
            traceback.print_exc()


def compile_alone(case: Case) -> None:
    """Run a case's calls once, for the kernels that the cache on disk then holds."""
    for (call,) in case.calls([case.inputs()]).values():
        call()


def compile_beside(every: Sequence[Case]) -> None:
    """Compile what some cases need, in as many processes as there are cores beside this one."""
    processes = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1, len(every)))
    # a forked process could not use a GPU
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for case, done in [(case, pool.submit(compile_alone, case)) for case in every]:
            if error := done.exception():
                print(f"{case.op} was not compiled beside: {error!r}", file=sys.stderr)


def weigh(case: Case, call: measure.Call, inputs: Sequence[list[Tensor]]) -> measure.Memory:
    held = [tensor for each in inputs for tensor in each]
    return measure.memory(call, inputs=held, device=case.device)


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    rounds = options.rounds or ROUNDS[device.type]
    tables = list(options.tables(device))
    if options.beside:
        compile_beside([case for cases in tables for case in cases])
    with measure.own_stream(device):
        about = asdict(ceilings(device, DTYPE)) | asdict(machine(device)) | {"command": called()}
        failed: list[str] = []
        for cases in tables:
            rows = (row | about for row in rows_that_can_be(cases, rounds, failed))
            emit(rows, as_json=options.json)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(parsed(Options))
