"""One layer, forward plus backward: what it keeps, its peak and its time.

Every policy of the fused layer runs against plain torch, torch.compile, torch.compile under budgets
of activation memory, and a checkpointed layer, on the same inputs. One line or row is one
competitor in one case:

    saved_units      what the backward keeps, in D elements per token of the case's dtype, without
                     the layer's parameters; a token of either stream of a joint layer counts
    peak_bytes       highest total of what one call allocates, beyond resident_bytes; the gradients
                     of inputs and parameters, which every call returns, are part of it
    resident_bytes   inputs and parameters, and on a GPU workspaces that outlive a call
    achieved_tflops  floating-point operations of three forwards, over median_ms
    launches_forward, launches_backward  kernels of a GPU, counted without one by `launches`; None
                     where a compiler makes the kernels
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import measure
import torch
from launches import of_layer
from layer_case import IMPLS, LAYERS, Competitor, LayerCase, LayerStep, competitors, make_inputs
from machine import ceilings, device_name, machine
from program import Known, Program, called, main
from show import Row

DTYPES = ("float32", "bfloat16", "float16", "autocast")
WIDTHS = {"cpu": ((384, 6),), "cuda": ((384, 6), (1024, 16), (1152, 16))}  # of DiT-S, L and XL
SAMPLES = {"cpu": 4, "cuda": 32}
TOKENS = 256
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
ROUNDS = {"cpu": 15, "cuda": 50}


@dataclass(frozen=True)
class Options(Program):
    """Time and weigh one layer, forward plus backward, against its competitors.

    What is not given depends on the device.
    """

    layer: tuple[str, ...] = ("adaln",)  # adaln, joint or parallel
    B: int | None = None  # samples
    T: int | None = None  # tokens of a sample; a joint layer's context has a quarter as many more
    dim: int | None = None  # of the residual stream
    num_heads: int | None = None  # 64 wide each where only dim is given
    hidden: int | None = None  # width of the MLP's hidden layer; 4 dim where it is not given
    dtype: tuple[str, ...] = ()  # of everything, or autocast: float32 that computes in bfloat16
    impls: tuple[str, ...] = IMPLS  # competitors, in the order of the table
    budgets: tuple[float, ...] = (0.9, 0.5, 0.4, 0.2)  # of compiled_budget, from 0 to 1
    rounds: int | None = None  # in each of which every competitor is timed once
    launches: bool = False  # only count the kernels that a GPU launches, without one
    target: str = "auto"  # that GPU: a100, h100, ...; auto is the device, or else an H100

    def __post_init__(self):
        self.require_positive("B", "T", "dim", "num_heads", "hidden", "threads")
        self.require_known(layer=tuple(LAYERS), dtype=DTYPES, impls=IMPLS)
        self.require_share("budgets")
        self.require_positive("rounds", least=2)
        if self.num_heads is not None and self.dim is None:
            raise ValueError("num_heads must be given together with dim, got num_heads alone")
        for case in self.cases():
            if case.dim % case.num_heads:
                raise ValueError(f"num_heads must divide dim = {case.dim}, got {case.num_heads}")
        self.gpu(self.target)

    def cases(self) -> list[LayerCase]:
        kind = self.on.type
        heads = self.num_heads or max((self.dim or 0) // 64, 1)
        B, T = self.B or SAMPLES[kind], self.T or TOKENS
        return [
            LayerCase(B, T, D, H, self.hidden or 4 * D, dtype, layer)
            for layer in self.layer
            for dtype in self.dtype or (DTYPE[kind],)
            for D, H in ([(self.dim, heads)] if self.dim else WIDTHS[kind])
        ]

    def players(self, case: LayerCase) -> list[Competitor]:
        return competitors(self.impls, self.budgets, mixed=case.autocast)

    def key_of(self, case: LayerCase, player: Competitor) -> Row:
        """What a row is known by."""
        return case.told() | asdict(player) | {"device": device_name(self.on)}

    def wanted(self) -> list[Row]:
        return [self.key_of(case, player) for case in self.cases() for player in self.players(case)]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        if self.launches:
            self._print_launches()
            return
        for case in self.cases():
            lacks = [p for p in self.players(case) if known.lacks(self.key_of(case, p))]
            yield rows_of(case, lacks, self) if lacks else ()

    def _print_launches(self) -> None:
        for case in self.cases():
            for player in self.players(case):
                forward, backward = of_layer(case, player, self.gpu(self.target))
                layer = None if case.layer == "adaln" else case.layer
                name = " ".join(filter(None, (layer, player.impl, player.recompute)))
                print(f"{name:<16} {forward or '–':>3} + {backward or '–'}")


def rows_of(case: LayerCase, players: Sequence[Competitor], options: Options) -> list[Row]:
    """One row for each competitor, in their order."""
    device = options.on
    # a function is recompiled for so many shapes only before it is left in plain torch
    torch.compiler.reset()
    rounds = options.rounds or ROUNDS[device.type]
    counted = [of_layer(case, player, options.gpu(options.target)) for player in players]
    with measure.own_stream(device):
        inputs = make_inputs(case, device)
        steps = {
            player: LayerStep(player.function(case.num_heads, case.layer), inputs, case.autocast)
            for player in players
        }
        # before any is captured, whose memory would stay; compiled once for this and for the clock
        weighed = [weigh(case, step, device) for step in steps.values()]
        times = measure.interleaved(steps, device=device, rounds=rounds)
        about = ceilings(device, case.compute_dtype) | machine(device)
    return [
        asdict(player)
        | case.told()
        | {"launches_forward": forward, "launches_backward": backward}
        | weights
        | asdict(times[player])
        | {"achieved_tflops": case.flops / times[player].median_ms / 1e9}
        | {"implementation": player.implementation(device)}
        | about
        | {"command": called()}
        for player, (forward, backward), weights in zip(players, counted, weighed, strict=True)
    ]


def weigh(case: LayerCase, step: LayerStep, device: torch.device) -> Row:
    """What a step keeps, its peak, and what was there before."""
    inputs = step.inputs
    found = measure.memory(step, inputs=[*inputs.leaves, *inputs.douts], device=device)
    saved = measure.saved_bytes(step.forward, parameters=inputs.parameters)
    return {"saved_units": saved / case.unit_bytes} | found


if __name__ == "__main__":
    main(Options)
