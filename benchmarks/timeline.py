"""What is alive op after op in one training step, predicted, of a few ways to train one model.

One line or row is one step. It needs no GPU, and no memory of the step's size:

    levels  bytes by category of each part of the step, at that part's highest moment; a part has
            as many of the ops that allocate or free as any other
    starts  first op of each part
    phases  such as forward, each with its first op
    at      phase and op of the peak
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import training
from program import Known, Program, main
from show import Row
from training_step import DTYPES

from dbkernels.memory.timeline import levels
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import METHODS, OFFLOAD, Recipe

PARTS = 240  # columns of a small figure
PREDICTED = ("peak_allocated_bytes", "peak_reserved_bytes", "by_category", "at")


@dataclass(frozen=True)
class Options(Program):
    """Predict a training step op after op, for a picture of it."""

    family: str = "dit"  # vit or dit
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

    def __post_init__(self):
        self.require_positive("batch", "threads")
        self.require_known(dtype=DTYPES, recompute=POLICIES, offload=OFFLOAD, methods=METHODS)
        self.require_share("budget")
        self.ways()

    @cached_property
    def steps(self) -> training.Options:
        """The same steps as a benchmark of their times has them."""
        is_here = self.target == "auto" and self.on.type == "cuda"
        one = ("preset", "dtype", "num_blocks", "recompute", "offload", "optimizer_in_backward")
        return training.Options(
            device=self.device,
            family=self.family,
            batch=self.batch,
            methods=self.methods,
            budgets=(self.budget,),
            target="this" if is_here else self.gpu(self.target).name,
            **{name: (getattr(self, name),) for name in one},
        )

    def ways(self) -> list[Recipe]:
        (model,) = self.steps.models()
        return self.steps.ways(model)

    def key_of(self, recipe: Recipe) -> Row:
        """What a row is known by."""
        return self.steps.key_of(recipe) | {"suite": "timeline"}

    def wanted(self) -> list[Row]:
        return [self.key_of(recipe) for recipe in self.ways()]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        yield (self.row_of(way) for way in self.ways() if known.lacks(self.key_of(way)))

    def row_of(self, recipe: Recipe) -> Row:
        prediction = dry_run(recipe)[recipe.offload]
        shown = levels(prediction, parts=PARTS)
        return (
            self.steps.about(recipe)
            | self.key_of(recipe)
            | {name: getattr(prediction, name) for name in PREDICTED}
            | {
                "memory": "predicted",
                "starts": shown.starts,
                "phases": shown.phases,
                "levels": shown.by_category,
                "implementation": training.ON_A_GPU.get(recipe.method, "torch"),
            }
        )


if __name__ == "__main__":
    main(Options)
