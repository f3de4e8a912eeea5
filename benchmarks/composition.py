"""What composes with block-wise training: peaks, bytes that are sent, operations.

    python benchmarks/composition.py

One line or row is one way to train a model, on one number of blocks, as one of its GPUs sees it:

    peak_allocated_bytes  highest total on a GPU in a step of the costliest block
    by_category           of that peak
    sent_bytes            that a step of a GPU hands to collectives: `collectives` says what counts
    host_bytes            that a step copies to the host and back
    flops, sweep_flops    of a step, and of a step of every block, on one GPU
    ratio                 of the peak to that of one block alone
    saved, apart          bytes less than that; and those that its parts save one by one, added up
    product               of its parts' ratios
    verdict               additive: the product is reached, within CLOSE
                          overlapping: it is not, and no part is better without the others
                          harmful: some part, or some of them, need less without the rest
    step_ms               only with `--measure`: median, of the slower of two processes

Blocks are one part and each word of a way another. A job has one block and as many GPUs as the way
says; each GPU has `batch` samples of a step, so more of them share a larger batch. A language model
of one block is the ordinary network, without noise. All is predicted, for a GPU that is not there:
a trainer is followed on tensors that hold nothing. A way that a trainer refuses has a row with the
reason and no figures. With `--measure` two processes of this CPU train small models over gloo.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import composition_gloo as gloo
import pipelined
from collectives import HOST, counting
from composition_ways import (
    OFFLOAD,
    ONE_JOB,
    Way,
    compared,
    sweep_flops,
    ways,
)
from machine import device_name, machine
from program import Known, Program, called, main
from show import Row
from training_step import DTYPES

from dbkernels.memory.allocator import target_named
from dbkernels.models.registry import FAMILIES
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import Recipe, of_preset
from dbkernels.planning.search import swapped_bytes
from dbkernels.pool import results

LAYERS = 4  # of a quick model
MODELS = {"dit": "XL/2", "ar": "paper"}
REFUSED = "refused"
FIGURES = ("peak_allocated_bytes", "by_category", "flops")
NOTHING = dict.fromkeys((*FIGURES, "sent_bytes", "sent", "host_bytes"))
NOTHING |= dict.fromkeys(("sweep_flops", "ratio", "saved", "product", "apart", "verdict"))


@dataclass(frozen=True)
class Options(Program):
    """Predict what blocks and other ways to need less memory give together."""

    family: tuple[str, ...] = ()  # dit or ar, of sizes as they are published; both
    batch: int = 128  # samples of a step on each GPU, made up
    dtype: str = "autocast"  # or float32; autocast is compute in bfloat16
    num_blocks: tuple[int, ...] = (1, 3, 4)  # with 1
    target: str = "h100"  # that is predicted: a100, h100, ...
    measure: bool = False  # small models in place of these, on two processes of this CPU
    rounds: int = 5  # steps that are timed where something is measured
    quick: bool = False  # the smallest model of each family, on 1 and 2 blocks, and fewer ways

    def __post_init__(self):
        self.require_positive("batch", "threads")
        self.require_positive("rounds", least=2)
        self.require_known(family=MODELS, dtype=DTYPES)
        if self.measure and self.on.type != "cpu":
            raise ValueError(f"device must be cpu to measure, got {self.on.type}")
        if 1 not in self.num_blocks:
            raise ValueError(f"num_blocks must have 1, got {self.num_blocks}")
        for model in self.models():
            for way in self.ways(model):
                way.recipe(model)  # refuses numbers of blocks that there cannot be

    def models(self) -> list[Recipe]:
        """What is trained, and on what device."""
        told = {"autocast": self.dtype == "autocast", "device": target_named(self.target)}
        if self.measure:
            told = {"batch_size": 8, "device": target_named("cpu")}
            small = (of_preset(f, FAMILIES[f].model.smallest) for f in self.family or MODELS)
            return [gloo.small(replace(model, **told)) for model in small]
        if not self.quick:
            told["batch_size"] = self.batch
            return [replace(of_preset(f, MODELS[f]), **told) for f in self.family or MODELS]
        small = [of_preset(f, FAMILIES[f].model.smallest) for f in self.family or MODELS]
        told |= {"batch_size": 8, "preset": f"of {LAYERS} layers"}
        return [replace(m, model=replace(m.model, depth=LAYERS), **told) for m in small]

    def ways(self, model: Recipe) -> list[Way]:
        """All of them, each way on every number of blocks."""
        if self.measure:
            found = [Way(count, parts) for parts in gloo.WAYS for count in (1, 2)]
        else:
            found = ways(model, (1, 2) if self.quick else self.num_blocks, few=self.quick)
        return [way for way in found if pipelined.can_be(way.recipe(model))]

    def key_of(self, model: Recipe, way: Way) -> Row:
        """What a row is known by."""
        about = {"suite": "composition", "family": model.family, "preset": model.preset}
        about |= {"batch": model.batch_size, "dtype": DTYPES[model.autocast]}
        here = device_name(self.on) if self.measure else model.device.name.upper()
        about |= {"device": here}
        return about | {"num_blocks": way.num_blocks, "way": way.name}

    def wanted(self) -> list[Row]:
        return [self.key_of(model, way) for model in self.models() for way in self.ways(model)]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        about = {**machine(self.on), "driver": None, "command": called()}
        for model in self.models():
            every = self.ways(model)
            if any(known.lacks(self.key_of(model, way)) for way in every):
                # each is compared with others, so all are found
                rows = self._measured if self.measure else self._predicted
                found = zip(every, rows(model, every), strict=True)
                yield (about | self.key_of(model, way) | row for way, row in found)

    def _predicted(self, model: Recipe, every: list[Way]) -> Iterator[Row]:
        return rows_of(model, every, 1 if self.quick else None)

    def _measured(self, model: Recipe, every: list[Way]) -> Iterator[Row]:
        figures = dict(zip(every, gloo.rows_of(model, every, self.rounds), strict=True))
        # the tracker sees more of FSDP2 over gloo than there is: of a dry run, tests hold the peak
        # to the allocator of two ranks
        for way in (way for way in every if way.recipe(model).shard):
            row = followed(model, way)["none"]
            figures[way] |= {name: row[name] for name in ("peak_allocated_bytes", "by_category")}
        told = {"memory": "measured", "rounds": self.rounds, "timing": "wall clock"}
        return (row | told for row in _compared(model, figures))


def rows_of(model: Recipe, every: list[Way], most: int | None = None) -> Iterator[Row]:
    """The figures of some ways to train a model, in their order, by so many processes."""
    # one dry run tells of one block on the GPU, and of all
    keys = {way: _key(way) for way in every}
    jobs = [partial(followed, model, key) for key in dict.fromkeys(keys.values())]
    found = dict(zip(dict.fromkeys(keys.values()), results(jobs, most=most), strict=True))
    figures = {way: _chosen(way, found[keys[way]]) for way in every}
    return (row | {"memory": "predicted", "step_ms": None} for row in _compared(model, figures))


def _compared(model: Recipe, figures: dict[Way, Row]) -> Iterator[Row]:
    """Rows with what each way saves beside its parts."""
    there = {way: row for way, row in figures.items() if REFUSED not in row}
    peaks = {way: row["peak_allocated_bytes"] for way, row in there.items()}
    flops = {way: row["flops"] for way, row in there.items()}
    for way, row in figures.items():
        if way in there:
            sweep = {"sweep_flops": sweep_flops(way, way.recipe(model), flops)}
            yield row | sweep | compared(way, peaks) | {REFUSED: None}
        else:
            yield NOTHING | row


def _key(way: Way) -> Way:
    """The way of which the same dry run tells."""
    return replace(way, parts=(ONE_JOB,)) if OFFLOAD in way.parts else way


def _chosen(way: Way, found: dict[str, Row]) -> Row:
    """Of what is found of a way, what holds for it: a job has one block unless it has all."""
    if REFUSED in found:
        return found[REFUSED]
    row = found["none" if ONE_JOB in way.parts or "cpu" not in found else "cpu"]
    host = row["swapped_bytes" if OFFLOAD in way.parts else "copied_bytes"]
    return {name: each for name, each in row.items() if name in NOTHING} | {"host_bytes": host}


def followed(model: Recipe, way: Way) -> dict[str, Row]:
    """Figures of a step by what is on the GPU: all blocks, or one; or why there are none."""
    recipe = way.recipe(model)
    try:
        if recipe.stages > 1:
            return {"none": pipelined.predicted(recipe, recipe.stages)}
        with counting() as steps:
            found = dry_run(recipe)
    except ValueError as error:
        return {REFUSED: {REFUSED: str(error)}}
    sent = max(steps, key=lambda step: step.total())
    copied = sent.pop(HOST, 0)
    swapped = swapped_bytes(found, recipe) // recipe.num_blocks if "cpu" in found else 0
    about = {"sent_bytes": sent.total(), "sent": dict(sent)}
    about |= {"copied_bytes": copied, "swapped_bytes": swapped}
    return {
        place: {name: getattr(each, name) for name in FIGURES} | about
        for place, each in found.items()
    }


if __name__ == "__main__":
    main(Options)
