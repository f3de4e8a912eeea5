"""Every op with a kernel, forward and backward apart: its time and the bytes per second it reaches.

The op as a caller has it runs against the same in plain torch, and against what torch.compile makes
of that. Shapes, and the bytes that an op must move, are those of the kernel report. One line or row
is one implementation of one op in one direction at one width:

    hbm_bytes      each tensor of the op's kernel once, less what only a whole layer asks of it
    achieved_gbps  hbm_bytes over median_ms, to be read beside copy_gbps
    peak_bytes     highest total of what one call allocates, beyond resident_bytes
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import measure
import torch
from command import parsed
from compiled import compiled
from machine import ceilings, machine
from show import emit
from torch import Tensor

from dbkernels import ops
from dbkernels.cli.device import pick_device
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference

# the report's files stand beside each other and are no package
sys.path.append(str(Path(__file__).parents[1] / "tools"))
from kernel_cases import CASES, DTYPE, HEAD_DIM, B, T
from kernel_compile import PROCESSORS, bytes_moved, record

INPUTS = {  # of the op, with which the arguments of its forward kernel begin
    "adaln_norm": 3,
    "gated_adaln_norm": 5,
    "gated_residual": 3,
    "gelu": 2,
    "swiglu": 2,
    "qk_norm_rotary": 4,
}
FOR_A_LAYER = {  # what a layer asks of a kernel's backward, and the op alone does not
    "adaln_norm": {"dres_ptr", "y_ptr"},
    "gated_adaln_norm": {"y_ptr"},
    "gelu": {"u_ptr"},
    "swiglu": {"u_ptr"},
}
WIDTHS = {"cpu": (384,), "cuda": (384, 1024, 1152)}  # on a GPU those of DiT-S, L and XL
ROUNDS = {"cpu": 11, "cuda": 50}
DIRECTIONS = ("fwd", "bwd")
H100 = 90  # 10 times the compute capability; how many programs share a sum depends on it


@dataclass(frozen=True)
class Options:
    """Time the ops, forward and backward apart, against plain torch and torch.compile.

    What is not given depends on the device.
    """

    op: tuple[str, ...] = tuple(INPUTS)  # such as adaln_norm
    D: tuple[int, ...] = ()  # model widths
    impls: tuple[Literal["fused", "eager", "compiled"], ...] = ("fused", "eager", "compiled")
    rounds: int | None = None  # in each of which every implementation is timed once
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in self.op:
            if name not in INPUTS:
                raise ValueError(f"op must be one of {', '.join(INPUTS)}, got {name}")
        for D in self.D:
            if D < HEAD_DIM or D % HEAD_DIM:
                raise ValueError(f"D must be a multiple of {HEAD_DIM}, got {D}")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        pick_device(self.device)


class OpCase(NamedTuple):
    """One op at one width."""

    op: str
    D: int
    impls: tuple[str, ...]
    device: torch.device

    def inputs(self) -> list[Tensor]:
        """Of unit variance, with the shapes and strides of the report's."""
        random = torch.Generator().manual_seed(0)
        arguments = CASES[f"{self.op}_fwd"].arguments(self.D)[: INPUTS[self.op]]
        return [
            _filled(like, random, self.device).requires_grad_()
            if like.dtype == DTYPE
            # the table of angles alone has another dtype, and no gradient
            else rotary_table(torch.arange(T), HEAD_DIM).to(self.device)
            for like in arguments
        ]

    def function(self, impl: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        if impl == "fused":
            return _on_tensors(getattr(ops, self.op), self.D)
        eager = _on_tensors(getattr(reference, self.op), self.D)
        # a backward that is timed alone runs often on one forward
        return compiled(eager, {"donated_buffer": False}) if impl == "compiled" else eager

    def calls(self, inputs: list[Tensor]) -> dict[tuple[str, str], Callable[[], object]]:
        """By implementation and direction; a backward's begins after a forward that is done here.

        All have the same incoming gradients.
        """
        calls, leaves = {}, [tensor for tensor in inputs if tensor.requires_grad]
        for impl in self.impls:
            forward, random = partial(self.function(impl), *inputs), torch.Generator()
            outs = _as_tuple(forward())
            douts = [_filled(out, random.manual_seed(1), self.device) for out in outs]
            backward = partial(torch.autograd.grad, outs, leaves, douts, retain_graph=True)
            calls |= {(impl, "fwd"): forward, (impl, "bwd"): backward}
        return calls

    def hbm_bytes(self, direction: str) -> int:
        case = CASES[f"{self.op}_{direction}"]
        _, launch = record(case, self.D, _arch(self.device))
        left_out = FOR_A_LAYER.get(self.op, ()) if direction == "bwd" else ()
        kept = {name: a for name, a in launch.arguments.items() if name not in left_out}
        return bytes_moved(case, replace(launch, arguments=kept))


def _on_tensors(function: Callable, D: int) -> Callable:
    """An op as a function of its tensors alone."""
    if function.__name__ != "qk_norm_rotary":
        return function

    def heads_given(qkv, q_weight, k_weight, rotary):
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return function(qkv, D // HEAD_DIM, **weights, rotary=rotary)

    return heads_given


def _filled(like: Tensor, random: torch.Generator, device: torch.device) -> Tensor:
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return tensor.copy_(torch.randn(like.shape, generator=random))


def _as_tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outs,) if isinstance(outs, Tensor) else outs


def _arch(device: torch.device) -> int:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor in PROCESSORS:
            return 10 * major + minor
    return H100


def rows_of(case: OpCase, calls: dict, weighed: dict, rounds: int) -> Iterator[dict[str, object]]:
    """Rows by direction, and in it by implementation."""
    for direction in DIRECTIONS:
        moved = case.hbm_bytes(direction)
        competing = {impl: calls[impl, direction] for impl in case.impls}
        times = measure.interleaved(competing, device=case.device, rounds=rounds)
        for impl, of in times.items():
            row = {"impl": impl, "op": case.op, "direction": direction}
            row |= {"B": B, "T": T, "D": case.D, "dtype": str(DTYPE).removeprefix("torch.")}
            row |= asdict(of) | asdict(weighed[impl, direction]) | {"hbm_bytes": moved}
            row |= {"achieved_gbps": moved / of.median_ms / 1e6}
            yield row | {"implementation": _implementation(impl, case.device)}


def weigh(case: OpCase, calls: dict, inputs: list[Tensor]) -> dict[tuple[str, str], measure.Memory]:
    return {
        key: measure.memory(call, inputs=inputs, device=case.device) for key, call in calls.items()
    }


def weigh_alone(case: OpCase) -> dict[tuple[str, str], measure.Memory]:
    inputs = case.inputs()
    return weigh(case, case.calls(inputs), inputs)


def _implementation(impl: str, device: torch.device) -> str:
    return {"fused": ops.implementation(device), "compiled": "inductor", "eager": "torch"}[impl]


def rows_at(D: int, options: Options, device: torch.device) -> Iterator[dict[str, object]]:
    """The rows of one width, op by op."""
    cases = [OpCase(op, D, options.impls, device) for op in options.op]
    if device.type == "cuda":
        weighed = measure.in_fresh_processes(weigh_alone, cases)
    for number, case in enumerate(cases):
        # a function is recompiled for so many shapes only before it is left in plain torch
        torch.compiler.reset()
        inputs = case.inputs()
        calls = case.calls(inputs)
        memory = weighed[number] if device.type == "cuda" else weigh(case, calls, inputs)
        yield from rows_of(case, calls, memory, options.rounds or ROUNDS[device.type])


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    with measure.own_stream(device):
        about = asdict(ceilings(device, DTYPE)) | asdict(machine(device))
        for D in options.D or WIDTHS[device.type]:
            rows = [row | about for row in rows_at(D, options, device)]
            emit(rows, as_json=options.json)


if __name__ == "__main__":
    main(parsed(Options))
