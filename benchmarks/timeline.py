"""What is alive op after op in one training step, predicted, of a few ways to train one model.

One line or row is one step. It needs no GPU, and no memory of the step's size:

    levels  bytes by category of each part of the step, at that part's highest moment; a part has
            as many of the ops that allocate or free as any other
    starts  first op of each part
    phases  such as forward, each with its first op
    at      phase and op of the peak
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from command import called, parsed
from machine import machine
from show import emit
from training_case import METHODS, TrainingCase, Way, ways
from training_memory import predict

from dbkernels.cli.device import pick_device
from dbkernels.memory.allocator import Target, target_named, target_of
from dbkernels.memory.timeline import levels
from dbkernels.models.registry import FamilyName
from dbkernels.ops.layer.recompute import POLICIES

Row = dict[str, object]

PARTS = 240  # columns of a small figure
RUNS = {"block_fused": "triton", "compiled": "inductor"}  # on a GPU; the others are plain torch
DEFAULT_TARGET = "h100"


@dataclass(frozen=True)
class Options:
    """Predict a training step op after op, for a picture of it."""

    family: FamilyName = "dit"  # vit or dit
    preset: str = "XL/2"  # of the family
    batch: int = 128  # samples of a step, made up
    dtype: str = "autocast"  # or float32; autocast is compute in bfloat16
    methods: tuple[str, ...] = ("end_to_end", "checkpointed", "block_fused")
    num_blocks: int = 4  # of block_stock and block_fused
    recompute: str = "layer"  # of block_fused
    budget: float = 0.5  # of activation memory, of compiled
    offload: str = "cpu"  # of block_fused; none has all blocks on the device
    optimizer_in_backward: bool = False  # of all methods that are shown
    target: str = "auto"  # a100, h100, ...; auto is the GPU that is here, or else an H100
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table

    def __post_init__(self):
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        chosen = {
            "dtype": ("float32", "autocast"),
            "recompute": POLICIES,
            "offload": ("none", "cpu"),
        }
        for name, values in chosen.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)}"
                )
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods must be of {', '.join(METHODS)}, got {method}")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget must be from 0 to 1, got {self.budget}")
        if not 1 <= self.num_blocks <= self.case.depth:
            raise ValueError(
                f"num_blocks must be from 1 to the {self.case.depth} layers of {self.preset}, "
                f"got {self.num_blocks}"
            )
        self.target_and_name()

    @property
    def case(self) -> TrainingCase:
        return TrainingCase(self.family, self.preset, self.batch, self.dtype)

    @property
    def ways(self) -> list[Way]:
        chosen = (
            self.num_blocks,
            self.recompute,
            self.budget,
            self.offload,
            self.optimizer_in_backward,
            "ops",
        )
        return ways(self.methods, *((each,) for each in chosen))

    def target_and_name(self) -> tuple[Target, Row]:
        """What is predicted, and how a row names it where it is not the device that is here."""
        device = pick_device(self.device)
        if self.target == "auto" and device.type == "cuda":
            return target_of(device), {}
        target = target_named(DEFAULT_TARGET if self.target == "auto" else self.target)
        return target, {"device": target.name.upper(), "driver": None}


def rows_of(options: Options) -> Iterator[Row]:
    """One row for each way, as they are found."""
    target, name = options.target_and_name()
    about = asdict(machine(pick_device(options.device))) | name | {"command": called()}
    for way in options.ways:
        prediction = predict(options.case, way, target)[way.offload]
        shown = levels(prediction, parts=PARTS)
        yield (
            {"suite": "timeline"}
            | asdict(options.case)
            | asdict(way)
            | {
                "peak_allocated_bytes": prediction.peak_allocated_bytes,
                "peak_reserved_bytes": prediction.peak_reserved_bytes,
                "memory": "predicted",
                "by_category": prediction.by_category,
                "at": prediction.at,
                "starts": shown.starts,
                "phases": shown.phases,
                "levels": shown.by_category,
                "implementation": RUNS.get(way.method, "torch"),
            }
            | about
        )


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = rows_of(options)
    if not options.json:
        emit(list(found), as_json=False)
        return
    for row in found:
        emit([row], as_json=True)


if __name__ == "__main__":
    main(parsed(Options))
