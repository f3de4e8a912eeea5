"""Ways to need less memory that may be taken together with blocks, and what two of them give.

A way is some parts, each of which may be a way by itself. With several blocks each has a job of its
own, whose GPUs hold that block and no other, as `train --block` has it; where the part `one job`
says so, one GPU holds all blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, combinations
from math import prod

from show import Row

from dbkernels.models.baseline import use_baseline
from dbkernels.models.registry import family_named
from dbkernels.ops.layer.recompute import policies_of
from dbkernels.planning.recipe import Recipe
from dbkernels.training.run_config import Objective
from dbkernels.training.trainer import Trainer

Parts = tuple[str, ...]
PLAIN, ONE_JOB, OFFLOAD = "plain torch", "one job", "parameter offload"
PIPELINES = {"pipeline 2": 2, "pipeline 4": 4}
RECOMPUTE = "recompute "
SETTINGS: dict[str, Row] = {
    PLAIN: {"method": "block_stock", "recompute": None},
    "checkpointing": {"method": "block_stock", "recompute": None, "checkpointed": True},
    "FSDP2 2": {"data_parallel": 2, "shard": True},
    "FSDP2 8": {"data_parallel": 8, "shard": True},
    "FSDP2 64": {"data_parallel": 64, "shard": True},
    "tensor 2": {"tensor_parallel": 2},
    "tensor 4": {"tensor_parallel": 4},
    "tensor 8": {"tensor_parallel": 8},
    **{name: {"stages": stages} for name, stages in PIPELINES.items()},
    "activation offload": {"offload_activations": True},
    OFFLOAD: {},
    "optimizer in backward": {"optimizer_in_backward": True},
    ONE_JOB: {},
}
TOGETHER = (
    ("FSDP2 8", RECOMPUTE + "layer"),
    ("FSDP2 8", "activation offload"),
    ("FSDP2 8", "optimizer in backward"),
    ("tensor 2", RECOMPUTE + "layer"),
    ("tensor 2", "FSDP2 8"),
    ("tensor 2", "FSDP2 8", RECOMPUTE + "layer"),
    ("activation offload", RECOMPUTE + "layer"),
    ("activation offload", "optimizer in backward"),
    ("optimizer in backward", RECOMPUTE + "layer"),
)
FEW = {
    "FSDP2 8",
    "optimizer in backward",
    "tensor 2",
    "activation offload",
    OFFLOAD,
    ONE_JOB,
    RECOMPUTE + "layer",
}
NEEDS_BLOCKS = (ONE_JOB, OFFLOAD)  # one block is all that there is
CLOSE = 0.1  # of the product of the ratios, within which it counts as reached
SAME = 0.01  # of a peak, within which two are alike


@dataclass(frozen=True)
class Composed(Recipe):
    """A recipe whose one block of a language model is the ordinary network, without noise."""

    checkpointed: bool = False
    """Whether plain torch checkpoints every layer."""
    stages: int = 1
    """Of a pipeline, each a GPU."""

    @property
    def objective(self) -> Objective:
        """As that of a recipe, also of the fused layers."""
        ordinary = bool(family_named(self.family).conventional)
        return "conventional" if ordinary and self.num_blocks == 1 else "blocks"

    def trainer(self, *where: object) -> Trainer:
        """As that of a recipe."""
        trainer = super().trainer(*where)
        if self.checkpointed:
            use_baseline(trainer.blocks.model, "checkpointed")
        return trainer


@dataclass(frozen=True)
class Way:
    """Some parts, on a number of blocks."""

    num_blocks: int
    parts: Parts = ()

    @property
    def name(self) -> str:
        """As a row has it."""
        return " + ".join(self.parts) or "alone"

    @property
    def start(self) -> "Way":
        """What its peak is compared with: one block, alone, of the same layers."""
        return Way(1, (PLAIN,) if {PLAIN, "checkpointing"} & {*self.parts} else ())

    @property
    def cut(self) -> "Way":
        """The blocks alone, of the same layers and in as many jobs."""
        return Way(self.num_blocks, (ONE_JOB,) if OFFLOAD in self.parts else self.start.parts)

    @property
    def every(self) -> "list[Way]":
        """Its parts, each as a way by itself."""
        single = [Way(1, (part,)) for part in self.parts if part != PLAIN]
        return ([self.cut] if self.num_blocks > 1 else []) + single

    @property
    def fewer(self) -> "Iterable[Way]":
        """What is left of it without some of its parts."""
        sizes = range(len(self.parts))
        some = chain.from_iterable(combinations(self.parts, size) for size in sizes)
        less = [Way(self.num_blocks, parts or self.cut.parts) for parts in some]
        return [way for way in [*less, Way(1, self.parts)] if way != self]

    def recipe(self, model: Recipe) -> Composed:
        """Of a model, with as many samples on each GPU as the model's own recipe has."""
        known = {field.name for field in fields(Recipe)}
        values = {name: getattr(model, name) for name in known} | {"num_blocks": self.num_blocks}
        for part in self.parts:
            own = {"recompute": part.removeprefix(RECOMPUTE)}
            values |= own if part.startswith(RECOMPUTE) else SETTINGS[part]
        values["batch_size"] *= values["data_parallel"]
        if self.num_blocks > 1 and not {*self.parts} & {*NEEDS_BLOCKS}:
            values["sharing"] = "copies"  # a block that is trained alone shares nothing
        return Composed(**values)


def ways(model: Recipe, counts: Sequence[int], *, few: bool = False) -> list[Way]:
    """Every way to train a model, one after another, each on every number of blocks.

    Args:
        model:   whose heads tensor parallelism shares out
        counts:  numbers of blocks, with 1
        few:     only those of a few parts
    """
    policies = [p for p in policies_of(mixed=model.autocast) if p != "none"]
    single = [(PLAIN,), ("checkpointing",), *((RECOMPUTE + name,) for name in policies)]
    single += [(part,) for part in SETTINGS if part not in (PLAIN, "checkpointing")]
    every = [(), *single, *TOGETHER]
    every = [parts for parts in every if not {*parts} & {"FSDP2 2", "pipeline 2"}]
    # over 4 GPUs only where 8 cannot share the heads
    unshared = "tensor 8" if model.model.num_heads % 8 else "tensor 4"
    every = [parts for parts in every if unshared not in parts and (not few or {*parts} <= FEW)]
    return [
        Way(count, parts)
        for parts in every
        for count in counts
        if count > 1 or not {*parts} & {*NEEDS_BLOCKS}
    ]


def compared(way: Way, peaks: Mapping[Way, int]) -> Row:
    """What a way saves, beside what its parts save.

    Args:
        way:    of two parts or more; blocks count as one
        peaks:  bytes of each way
    Returns:
        ratio, of the peak to that of one block alone; product, of its parts' ratios; saved and
        apart, bytes that it saves and what its parts save one by one, added up, which may
        be negative; and verdict. All but the ratio are None where there is one part.
    """
    start, peak = peaks[way.start], peaks[way]
    # with one block there is nothing to bring from the host
    parts = [peaks.get(each, start) for each in way.every]
    found: Row = {"ratio": peak / start, "saved": start - peak}
    if len(parts) < 2:
        return found | dict.fromkeys(("product", "apart", "verdict"))
    product = prod(part / start for part in parts)
    best = min([*parts, *(peaks[each] for each in way.fewer if each in peaks)])
    if peak > (1 + SAME) * best:
        verdict = "harmful"
    else:
        verdict = "additive" if peak / start <= (1 + CLOSE) * product else "overlapping"
    apart = sum(start - part for part in parts)
    return found | {"product": product, "apart": apart, "verdict": verdict}


def sweep_flops(way: Way, recipe: Recipe, flops: Mapping[Way, int]) -> int:
    """Operations of a step of every block, from those of a step of the largest and of all layers.

    Each layer takes as many as any other, and what is outside of them the same in every step. Of a
    pipeline the longest stage counts, which uneven blocks have too.
    """
    depth, count = recipe.model.depth, way.num_blocks
    largest, own = -(-depth // count), flops[way]
    if depth % count == 0 or recipe.stages > 1:
        return count * own
    parts = tuple(part for part in way.parts if part not in NEEDS_BLOCKS)
    whole = flops[replace(way, num_blocks=1, parts=parts)]
    layer = (whole - own) // (depth - largest)
    return count * own - (count * largest - depth) * layer
