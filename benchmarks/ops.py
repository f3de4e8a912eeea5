"""Every op with a kernel, forward and backward apart: its time and the bytes per second it reaches.

The op as a caller has it runs against the same in plain torch, and against what torch.compile makes
of that. The ops of a step's noise and loss compute their gradient in the forward, so both
directions are one call. One line or row is one implementation of one op in one direction:

    bytes_moved      each tensor that the op must read or write once
    achieved_gbps    bytes_moved over median_ms, to be read beside copy_gbps
    allocated_bytes  highest total of what one call allocates, beyond resident_bytes
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import measure
import torch
from command import called, parsed
from machine import ceilings, machine
from noise_case import PASSES, SHAPES, NoiseCase
from op_case import DTYPE, DTYPES, HEAD_DIM, INPUTS, OpCase
from show import emit
from torch import Tensor

from dbkernels.cli.device import pick_device

Case = OpCase | NoiseCase

WIDTHS = {"cpu": (384,), "cuda": (384, 1024, 1152)}  # on a GPU those of DiT-S, L and XL
ROUNDS = {"cpu": 11, "cuda": 50}


@dataclass(frozen=True)
class Options:
    """Time the ops, forward and backward apart, against plain torch and torch.compile.

    What is not given depends on the device.
    """

    op: tuple[str, ...] = (*INPUTS, *PASSES)  # such as adaln_norm
    D: tuple[int, ...] = ()  # model widths, of the ops within a layer
    impls: tuple[Literal["fused", "eager", "compiled"], ...] = ("fused", "eager", "compiled")
    rounds: int | None = None  # in each of which every implementation is timed once
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in self.op:
            if name not in INPUTS and name not in PASSES:
                raise ValueError(f"op must be one of {', '.join((*INPUTS, *PASSES))}, got {name}")
        for D in self.D:
            if D < HEAD_DIM or D % HEAD_DIM:
                raise ValueError(f"D must be a multiple of {HEAD_DIM}, got {D}")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        pick_device(self.device)

    def tables(self, device: torch.device) -> Iterator[list[Case]]:
        """The cases, by width and then by shape."""
        for D in self.D or WIDTHS[device.type]:
            yield [OpCase(op, D, self.impls, device) for op in self.op if op in INPUTS]
        dtype = DTYPES[device.type]
        for shape in SHAPES:
            noise = (op for op in self.op if op in PASSES)
            yield [NoiseCase(op, shape, dtype, self.impls, device) for op in noise]


def rows_of(case: Case, calls: dict, weighed: dict, rounds: int) -> Iterator[dict[str, object]]:
    """Rows by direction, and in it by implementation."""
    for direction in case.directions:
        moved = case.bytes_moved(direction)
        competing = {impl: calls[impl, direction] for impl in case.impls}
        times = measure.interleaved(competing, device=case.device, rounds=rounds)
        for impl, of in times.items():
            row = {"impl": impl, "op": case.op, "direction": direction}
            row |= {"implementation": case.implementation(impl, direction)}
            row |= {"shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
            row |= asdict(of) | {"bytes_moved": moved, "achieved_gbps": moved / of.median_ms / 1e6}
            memory = weighed[impl, direction]
            row |= {"allocated_bytes": memory.peak_bytes, "resident_bytes": memory.resident_bytes}
            yield row


def weigh(case: Case, calls: dict, inputs: list[Tensor]) -> dict[tuple[str, str], measure.Memory]:
    return {
        key: measure.memory(call, inputs=inputs, device=case.device) for key, call in calls.items()
    }


def weigh_alone(case: Case) -> dict[tuple[str, str], measure.Memory]:
    inputs = case.inputs()
    return weigh(case, case.calls(inputs), inputs)


def rows_at(
    cases: Sequence[Case], rounds: int | None, device: torch.device
) -> Iterator[dict[str, object]]:
    """The rows of some cases, one after another."""
    if device.type == "cuda":
        weighed = measure.in_fresh_processes(weigh_alone, cases)
    for number, case in enumerate(cases):
        # a function is recompiled for so many shapes only before it is left in plain torch
        torch.compiler.reset()
        inputs = case.inputs()
        calls: dict[tuple[str, str], Callable[[], object]] = case.calls(inputs)
        memory = weighed[number] if device.type == "cuda" else weigh(case, calls, inputs)
        yield from rows_of(case, calls, memory, rounds or ROUNDS[device.type])


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    with measure.own_stream(device):
        about = asdict(ceilings(device, DTYPE)) | asdict(machine(device)) | {"command": called()}
        for cases in options.tables(device):
            if cases:
                rows = [row | about for row in rows_at(cases, options.rounds, device)]
                emit(rows, as_json=options.json)


if __name__ == "__main__":
    main(parsed(Options))
