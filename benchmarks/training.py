"""Whole training steps: the time of a step and of a sweep of all blocks, and the peak of a step.

The fused layer, block by block and end to end, runs against the same model in plain torch end to
end, compiled, checkpointed, and block by block as the published code does; where memory is the
aim, also with the optimizer in the backward. All have the same parameters, optimizer (fused
AdamW), batch, precision and noise. A competitor is one trainer, its call one step of the next of
its blocks: a round has a step of each.
One line or row is one way of training:

    step_ms               median of a step of each block, averaged over the blocks; with offload a
                          step also brings its block from the host
    sweep_ms              of a step of every block
    peak_allocated_bytes  highest total on the device in a step of the costliest block
    saved_bytes           what its forward leaves for the backward
    swap_ms, swap_bytes   of one block with offload: to the host, and another from there
    flops                 of a step's matmuls and attentions, those computed again too

The peaks are those of the process that also times the steps; `beside_bytes` is what others' own
parameters took there, which is not part of them. A way that fails is left out and named at the end.
A GPU that is not there is predicted: its rows have memory "predicted", and no times.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from command import called, parsed
from machine import machine
from rehearsal import rehearsing, small_preset
from show import emit
from training_case import METHODS, TrainingCase, Way, ways
from training_prepare import Preparation, candidates, preparing
from training_rows import Row, measured_rows, predicted_rows

from dbkernels.cli.device import pick_device
from dbkernels.memory.allocator import Target, target_named, target_of
from dbkernels.models.registry import FamilyName
from dbkernels.ops.layer.recompute import POLICIES, policies_of

DTYPES = ("float32", "autocast")
OFFLOAD = ("none", "cpu")
LAUNCH = ("ops", "graph")
LARGE = ("S/2", "B/2", "L/2", "XL/2")  # presets that a GPU trains
DEFAULT_TARGET = "h100"
SMALL = {"vit": ("cifar100",), "dit": ("digits",)}
ROUNDS = {"cpu": 12, "cuda": 36}  # the more blocks, the fewer steps of each


@dataclass(frozen=True)
class Options:
    """Time and weigh whole training steps, each way of training against the others.

    What is not given depends on the device.
    """

    family: FamilyName | None = None  # vit or dit; both on a CPU, dit on a GPU
    preset: tuple[str, ...] = ()  # of the family
    batch: int = 64  # samples of a step, made up
    dtype: tuple[str, ...] = ()  # float32, or autocast: compute in bfloat16
    num_blocks: tuple[int, ...] = (1, 2, 3, 4, 6)  # of block_stock and block_fused
    methods: tuple[str, ...] = METHODS  # in the order of the table
    recompute: tuple[str, ...] = ()  # of block_fused; all that differ
    budgets: tuple[float, ...] = (1.0, 0.5, 0.2)  # of activation memory, of compiled
    nearest: str | None = None  # one more, its peak nearest to the fused layers' at this policy
    offload: tuple[str, ...] = ()  # of block_fused; none has all blocks on the device
    offload_at: tuple[int, ...] = ()  # numbers of blocks to offload at; without any, all
    optimizer_in_backward: tuple[bool, ...] = (False, True)  # where memory is the aim
    launch: tuple[str, ...] = ("ops",)  # of block_fused: op by op, or a step as one CUDA graph
    rounds: int | None = None  # in each of which every way has one step
    target: str = "auto"  # only predict: a100, h100, ..., this; auto does where a GPU is missing
    beside: bool = False  # predict each measured peak too, and compile, in other processes
    early: bool = False  # a line also before a way is timed, of its memory; with json
    rehearse: bool = False  # run on a CPU what a GPU alone measures; the figures mean nothing
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        known = {
            "dtype": DTYPES,
            "methods": METHODS,
            "recompute": POLICIES,
            "offload": OFFLOAD,
            "launch": LAUNCH,
        }
        for name, values in known.items():
            for value in getattr(self, name):
                if value not in values:
                    raise ValueError(f"{name} must be of {', '.join(values)}, got {value}")
        if self.nearest is not None and not (self.beside and self.nearest in POLICIES):
            raise ValueError(
                f"nearest must be of {', '.join(POLICIES)} and come with beside, got {self.nearest}"
            )
        for budget in self.budgets:
            if not 0 <= budget <= 1:
                raise ValueError(f"budgets must be from 0 to 1, got {budget}")
        if self.preset and self.family is None:
            raise ValueError(f"preset must be given together with family, got {self.preset[0]}")
        with small_preset(self.rehearse):
            for case in self.cases():
                self._check(case)

    def _check(self, case: TrainingCase) -> None:
        for count in self.num_blocks:
            if not 1 <= count <= case.depth:
                raise ValueError(
                    f"num_blocks must be from 1 to the {case.depth} layers of {case.preset}, "
                    f"got {count}"
                )
        if self.target_of(case) is not None:
            return
        on_cpu = pick_device(self.device).type == "cpu" and not self.rehearse
        if "cpu" in self.offload and on_cpu:
            raise ValueError("offload must be none on a CPU, which is its own host, got cpu")
        if "graph" in self.launch and on_cpu:
            raise ValueError("launch must be ops on a CPU, got graph")
        needed = 2 * max(self.num_blocks, default=1)
        if self.rounds is not None and self.rounds < needed:
            raise ValueError(
                f"rounds must be at least {needed}, two steps of each block, got {self.rounds}"
            )

    def cases(self) -> list[TrainingCase]:
        on_gpu = pick_device(self.device).type == "cuda"
        families = [self.family] if self.family else ["dit"] if on_gpu else list(SMALL)
        return [
            TrainingCase(family, name, self.batch, dtype)
            for family in families
            for name in self.preset or (LARGE if on_gpu and family == "dit" else SMALL[family])
            for dtype in self.dtype or ("autocast" if on_gpu or name in LARGE else "float32",)
        ]

    def target_of(self, case: TrainingCase) -> Target | None:
        """The device that a case is predicted for; None where it runs."""
        device = pick_device(self.device)
        if self.target == "this":
            return target_of(device)
        if self.target != "auto":
            return target_named(self.target)
        missing = case.preset in LARGE and device.type == "cpu"
        return target_named(DEFAULT_TARGET) if missing else None

    def ways(self, case: TrainingCase) -> list[Way]:
        here = self.target_of(case) is None and pick_device(self.device).type == "cpu"
        offload = self.offload or (("none",) if here else OFFLOAD)
        found = ways(
            self.methods,
            self.num_blocks,
            self.recompute or policies_of(mixed=case.dtype == "autocast"),
            self.budgets,
            offload,
            self.optimizer_in_backward,
            self.launch,
        )
        at = self.offload_at or self.num_blocks
        return [way for way in found if way.offload == "none" or way.num_blocks in at]


def rows_of(
    case: TrainingCase, options: Options, ready: Preparation | None, failed: list[str]
) -> Iterator[Row]:
    """One row for each way, as they are found; the ways that failed are added to a list."""
    device, target = pick_device(options.device), options.target_of(case)
    about = asdict(machine(device)) | {"command": called()}
    every = options.ways(case)
    if target is not None:
        if options.target != "this":
            about |= {"device": target.name.upper(), "driver": None}
        yield from predicted_rows(case, every, target, about)
        return
    if options.nearest is not None:
        nearest = ready.nearest(case, options.nearest)
        every += [nearest] if nearest and nearest not in every else []
        ready.compile(case, every)
    rounds = options.rounds or ROUNDS[device.type]
    early = options.early and options.json
    yield from measured_rows(case, every, device, rounds, ready, about, early=early, failed=failed)


def run(options: Options, ready: Preparation | None) -> None:
    """Print all rows.

    Raises:
        SystemExit: some ways failed, which it names.
    """
    failed: list[str] = []
    measured = [case for case in options.cases() if options.target_of(case) is None]
    for case in measured if ready else ():
        ready.compile(case, options.ways(case))
        if options.nearest is not None:  # which is waited for before anything else
            ready.predict(case, candidates(options.nearest))
        ready.predict(case, options.ways(case))
    for case in options.cases():
        emit(rows_of(case, options, ready, failed), as_json=options.json)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, really = pick_device(options.device), options.rehearse
    beside = preparing(device, really) if options.beside else nullcontext()
    with rehearsing(really), beside as ready:
        run(options, ready)


if __name__ == "__main__":
    main(parsed(Options))
