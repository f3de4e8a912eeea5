"""One AdaLN layer, forward plus backward: what it keeps, its peak and its time.

Every policy of the fused layer runs against plain torch, torch.compile, torch.compile under budgets
of activation memory, and a checkpointed layer, on the same inputs. One line or row is one
competitor in one case:

    saved_units      what the backward keeps, in D elements per token of the case's dtype, without
                     the layer's parameters
    peak_bytes       highest total of what one call allocates, beyond resident_bytes; the gradients
                     of inputs and parameters, which every call returns, are part of it
    resident_bytes   inputs and parameters, and on a GPU workspaces that outlive a call
    achieved_tflops  floating-point operations of three forwards, over median_ms
    launches_forward, launches_backward  kernels of a GPU, counted without one by `launches`; None
                     where a compiler makes the kernels
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import measure
import torch
from command import called, parsed
from layer_case import IMPLS, LayerCase, LayerStep, competitors, make_inputs
from layer_launches import count, target_for
from machine import ceilings, machine
from show import emit

from dbkernels.cli.device import pick_device

Impl = Literal["eager", "fused", "compiled", "compiled_budget", "checkpointed"]
Dtype = Literal["float32", "bfloat16", "float16", "autocast"]


@dataclass(frozen=True)
class Defaults:
    """What a device runs unless it is told otherwise."""

    B: int
    T: int
    widths: tuple[tuple[int, int], ...]  # D and H; on a GPU those of DiT-S, L and XL
    dtypes: tuple[str, ...]
    rounds: int


DEFAULTS = {
    "cpu": Defaults(4, 256, ((384, 6),), ("float32",), 15),
    "cuda": Defaults(32, 256, ((384, 6), (1024, 16), (1152, 16)), ("bfloat16",), 50),
}


@dataclass(frozen=True)
class Options:
    """Time and weigh one AdaLN layer, forward plus backward, against its competitors.

    What is not given depends on the device.
    """

    B: int | None = None  # samples
    T: int | None = None  # tokens of a sample
    dim: int | None = None  # of the residual stream
    num_heads: int | None = None  # 64 wide each where only dim is given
    hidden: int | None = None  # width of the MLP's hidden layer; 4 dim where it is not given
    dtype: tuple[Dtype, ...] = ()  # of everything, or autocast: float32 that computes in bfloat16
    impls: tuple[Impl, ...] = IMPLS  # competitors, in the order of the table
    budgets: tuple[float, ...] = (0.9, 0.5, 0.4, 0.2)  # of compiled_budget, from 0 to 1
    rounds: int | None = None  # in each of which every competitor is timed once
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in ("B", "T", "dim", "num_heads", "hidden", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")
        if self.num_heads is not None and self.dim is None:
            raise ValueError("num_heads must be given together with dim, got num_heads alone")
        if self.dim is not None and self.dim % self.heads_of(self.dim):
            raise ValueError(
                f"num_heads must divide dim = {self.dim}, got {self.heads_of(self.dim)}"
            )
        for budget in self.budgets:
            if not 0 <= budget <= 1:
                raise ValueError(f"budgets must be from 0 to 1, got {budget}")
        pick_device(self.device)

    def heads_of(self, D: int) -> int:
        return self.num_heads or max(D // 64, 1)

    def cases(self) -> list[LayerCase]:
        defaults = DEFAULTS[pick_device(self.device).type]
        widths = defaults.widths if self.dim is None else ((self.dim, self.heads_of(self.dim)),)
        B, T = self.B or defaults.B, self.T or defaults.T
        return [
            LayerCase(B, T, D, H, self.hidden or 4 * D, dtype)
            for dtype in self.dtype or defaults.dtypes
            for D, H in widths
        ]


def rows_of(case: LayerCase, options: Options) -> list[dict[str, object]]:
    """One row for each competitor, in the order of the options."""
    device = pick_device(options.device)
    # a function is recompiled for so many shapes only before it is left in plain torch
    torch.compiler.reset()
    players = competitors(options.impls, options.budgets, mixed=case.autocast)
    rounds = options.rounds or DEFAULTS[device.type].rounds
    counted = [count(case, player, target_for(device)) for player in players]
    with measure.own_stream(device):
        inputs = make_inputs(case, device)
        steps = {
            player: LayerStep(player.function(case.num_heads), inputs, case.autocast)
            for player in players
        }
        # before any is captured, whose memory would stay; compiled once for this and for the clock
        weighed = [weigh(case, step, device) for step in steps.values()]
        times = measure.interleaved(steps, device=device, rounds=rounds)
        about = asdict(ceilings(device, case.compute_dtype)) | asdict(machine(device))
        about |= {"command": called()}
    return [
        asdict(player)
        | asdict(case)
        | asdict(launches)
        | weights
        | asdict(times[player])
        | {"achieved_tflops": case.flops / times[player].median_ms / 1e9}
        | {"implementation": player.implementation(device)}
        | about
        for player, launches, weights in zip(players, counted, weighed, strict=True)
    ]


def weigh(case: LayerCase, step: LayerStep, device: torch.device) -> dict[str, float]:
    """What a step keeps, its peak, and what was there before."""
    inputs = step.inputs
    taken = measure.memory(step, inputs=[*inputs.leaves, inputs.dout], device=device)
    saved = measure.saved_bytes(step.forward, parameters=inputs.parameters)
    return {"saved_units": saved / case.unit_bytes} | asdict(taken)


def report(options: Options) -> Iterator[list[dict[str, object]]]:
    """The rows of one case after the other."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for case in options.cases():
        yield rows_of(case, options)


def main(options: Options) -> None:
    for rows in report(options):
        emit(rows, as_json=options.json)


if __name__ == "__main__":
    main(parsed(Options))
