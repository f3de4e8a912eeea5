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

import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import measure
import torch
from attention_case import ATTENTIONS, AttentionCase
from machine import ceilings, device_name, machine
from op_case import DTYPE, DTYPES, HEAD_DIM, INPUTS, PASSES, SHAPES, STREAM, NoiseCase, OpCase
from program import Known, Program, called, main
from show import Row

from dbkernels.pool import processes

Case = OpCase | AttentionCase | NoiseCase

IMPLS = ("fused", "eager", "compiled")
WIDTHS = {"cpu": (384,), "cuda": (384, 1024, 1152)}  # on a GPU those of DiT-S, L and XL
PROCESSES = 14
COPY = "copy"  # beside the implementations
ROUNDS = {"cpu": 11, "cuda": 50}


@dataclass(frozen=True)
class Options(Program):
    """Time the ops, forward and backward apart, against plain torch and torch.compile.

    What is not given depends on the device.
    """

    op: tuple[str, ...] = (*INPUTS, *ATTENTIONS, *PASSES)  # such as adaln_norm
    dim: tuple[int, ...] = ()  # of the model; of the ops within a layer
    impls: tuple[str, ...] = IMPLS  # fused, eager, compiled
    # of the residual stream: same, that of all else; or float32 beside bfloat16
    stream: tuple[str, ...] = ("same",)
    samples: int | None = None  # of the noise's shapes, in place of 256
    rounds: int | None = None  # in each of which every implementation is timed once
    beside: bool = False  # first compile all kernels in other processes, for the cache on disk

    def __post_init__(self):
        known = {"impls": IMPLS, "stream": ("same", "float32")}
        self.require_known(op=(*INPUTS, *ATTENTIONS, *PASSES), **known)
        self.require_positive("threads", "samples")
        for D in self.dim:
            if D < HEAD_DIM or D % HEAD_DIM:
                raise ValueError(f"dim must be a multiple of {HEAD_DIM}, got {D}")
        self.require_positive("rounds", least=2)
        _ = self.on

    def cases(self) -> Iterator[list[Case]]:
        """By width and then by shape, in tables."""
        device = self.on
        for D in self.dim or WIDTHS[device.type]:
            for mixed in (stream == "float32" for stream in self.stream):
                asked = [op for op in self.op if op in (STREAM if mixed else INPUTS)]
                cases = [OpCase(op, D, self.impls, device, mixed) for op in asked]
                heads = [op for op in self.op if op in ATTENTIONS and not mixed]
                yield cases + [AttentionCase(op, D, self.impls, device) for op in heads]
        for samples, *rest in SHAPES:
            shape = (self.samples or samples, *rest)
            noise = [op for op in self.op if op in PASSES]
            yield [NoiseCase(op, shape, DTYPES[device.type], self.impls, device) for op in noise]

    def wanted(self) -> list[Row]:
        return [
            key_of(case, impl, direction)
            for cases in self.cases()
            for case in cases
            for direction in case.directions
            for impl in self.impls
        ]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        device, failed = self.on, []
        tables = [
            [(case, lacking) for case in cases if (lacking := lacking_of(case, known))]
            for cases in self.cases()
        ]
        if not any(tables):
            return
        if self.beside:
            compile_beside([case for cases in tables for case, _ in cases])
        rounds = self.rounds or ROUNDS[device.type]
        with measure.own_stream(device):
            about = ceilings(device, DTYPE) | machine(device) | {"command": called()}
            for cases in tables:
                yield (row | about for row in rows_that_can_be(cases, rounds, failed))
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")


def key_of(case: Case, impl: str, direction: str) -> Row:
    """What a row is known by."""
    about = {"shape": case.shape, "dtype": case.dtype_name, "device": device_name(case.device)}
    return {"impl": impl, "op": case.op, "direction": direction} | about


def lacking_of(case: Case, known: Known) -> dict[str, list[str]]:
    """By direction, the implementations without a row."""
    found = {
        way: [impl for impl in case.impls if known.lacks(key_of(case, impl, way))]
        for way in case.directions
    }
    return {direction: impls for direction, impls in found.items() if impls}


def rows_of(case: Case, rounds: int, lacking: dict[str, list[str]]) -> Iterator[Row]:
    """Rows by direction, and in it by implementation; what was compiled for one serves all."""
    # a function is recompiled for so many shapes only before it is left in plain torch
    torch.compiler.reset()
    asked = {impl for impls in lacking.values() for impl in impls}
    case = case._replace(impls=tuple(impl for impl in case.impls if impl in asked))
    moved = {direction: case.bytes_moved(direction) for direction in case.directions}
    count = measure.rotations(case.device, min(moved.values()))
    inputs = [case.inputs() for _ in range(count)]
    calls = case.calls(inputs)
    for direction, impls in lacking.items():
        competing = {impl: calls[impl, direction] for impl in impls}
        memory = {
            impl: measure.memory(call, inputs=chain(*inputs), device=case.device)
            for impl, (call, *_) in competing.items()
        }
        competing[COPY] = measure.copies(case.device, moved[direction], count)
        times = measure.interleaved(competing, device=case.device, rounds=rounds)
        copy_gbps = moved[direction] / times.pop(COPY).median_ms / 1e6
        for impl, of in times.items():
            gbps = moved[direction] / of.median_ms / 1e6
            yield (
                key_of(case, impl, direction)
                | {"implementation": case.implementation(impl, direction)}
                | asdict(of)
                | {"bytes_moved": moved[direction], "achieved_gbps": gbps}
                | {"same_size_copy_gbps": copy_gbps, "share_of_copy": gbps / copy_gbps}
                | {"launches": count, "allocated_bytes": memory[impl]["peak_bytes"]}
                | {"resident_bytes": memory[impl]["resident_bytes"]}
            )


def rows_that_can_be(
    cases: Sequence[tuple[Case, dict[str, list[str]]]], rounds: int, failed: list[str]
) -> Iterator[Row]:
    """The rows of all cases but those that raise something, whose names are added to a list."""
    for case, lacking in cases:
        try:
            yield from rows_of(case, rounds, lacking)
        except Exception:  # whatever it is, the other ops are worth their minutes
            failed.append(f"{case.op} {case.shape}")
            traceback.print_exc()


def compile_alone(case: Case) -> None:
    """Run a case's calls once, for the kernels that the cache on disk then holds."""
    for (call,) in case.calls([case.inputs()]).values():
        call()


def compile_beside(every: Sequence[Case]) -> None:
    """Compile what some cases need, in as many processes as there are cores beside this one."""
    count = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1, len(every)))
    with processes(count) as pool:
        for case, done in [(case, pool.submit(compile_alone, case)) for case in every]:
            if error := done.exception():
                print(f"{case.op} was not compiled beside: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main(Options)
