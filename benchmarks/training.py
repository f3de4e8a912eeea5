"""Whole training steps: the time of a step and of a sweep of all blocks, and the peak of a step.

The fused layer, block by block and end to end, runs against the same model in plain torch end to
end, compiled, checkpointed, and block by block as the published code does; where memory is the
aim, also with the optimizer in the backward. A family that is trained without noise elsewhere, as
language models are, has that network end to end: `FamilyEntry.conventional`. All have the same
parameters, optimizer (fused AdamW), batch, precision and noise. A competitor is one trainer, its
call one step of the next of its blocks: a round has a step of each.
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

import statistics
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import measure
import torch
from machine import CEILINGS, ceilings, device_name, faster, machine
from program import Known, Program, called, main
from rehearsal import rehearsing
from show import Row
from training_memory import Preparation, candidates, figures_of, preparing, weigh
from training_step import (
    DTYPES,
    LAUNCH,
    Steps,
    described,
    implementation_of,
    make_steps,
    named,
    step_times,
)

from dbkernels.memory.allocator import Target, target_named, target_of
from dbkernels.memory.measure import out_of_memory
from dbkernels.models.registry import FAMILIES
from dbkernels.ops.layer.recompute import POLICIES, policies_of
from dbkernels.planning.dry_run import predicted
from dbkernels.planning.recipe import (
    BLOCKWISE,
    METHODS,
    OFFLOAD,
    Recipe,
    of_preset,
    offloads_of,
    repeats,
)
from dbkernels.training.diffusion_blocks import SHARED
from dbkernels.training.trainer import Trainer

# presets that a GPU trains, and what is trained elsewhere
LARGE = {"dit": ("S/2", "B/2", "L/2", "XL/2"), "mdm": ("text8",), "ar": ("paper",)}
SMALL = {name: (entry.model.smallest,) for name, entry in FAMILIES.items()} | {"vit": ("cifar100",)}
BLOCKS = (1, 2, 3, 4, 6)  # numbers of them, those that a model has layers for
ROUNDS = {"cpu": 12, "cuda": 36}  # the more blocks, the fewer steps of each
SWAPS = 3
TIMES = ("step_ms", "p20_ms", "p80_ms", "sweep_ms", "samples_per_second", "rounds", "timing")
RATES = ("achieved_tflops", "share_of_matmul_rate")
UNTIMED = dict.fromkeys((*TIMES, *RATES, *CEILINGS))
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes")
# what a GPU runs; with CUDA's own kernels the memory is the same
ON_A_GPU = {"block_fused": "triton", "compiled": "inductor"}


@dataclass(frozen=True)
class Options(Program):
    """Time and weigh whole training steps, each way of training against the others.

    What is not given depends on the device.
    """

    family: str | None = None  # vit, dit, ...; without it all on a CPU, dit on a GPU
    preset: tuple[str, ...] = ()  # of the family
    words: tuple[int, ...] = ()  # vocabularies of a model of text; without any, its own
    batch: int = 64  # samples of a step, made up
    dtype: tuple[str, ...] = ()  # float32, or autocast: compute in bfloat16
    num_blocks: tuple[int, ...] = ()  # of block_stock and block_fused; without any, BLOCKS
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
    early: bool = False  # a line also before a way is timed, of its memory; with json or out
    rehearse: bool = False  # run on a CPU what a GPU alone measures; the figures mean nothing

    def __post_init__(self):
        self.require_positive("batch", "threads")
        self.require_known(family=FAMILIES, dtype=DTYPES, methods=METHODS, launch=LAUNCH)
        self.require_known(recompute=POLICIES, offload=OFFLOAD)
        self.require_share("budgets")
        if self.nearest is not None and not (self.beside and self.nearest in POLICIES):
            raise ValueError(
                f"nearest must be of {', '.join(POLICIES)} and come with beside, got {self.nearest}"
            )
        if self.words and not (self.family and FAMILIES[self.family].text):
            raise ValueError(f"words must come with a family of text, got {self.words[0]}")
        if self.preset and self.family is None:
            raise ValueError(f"preset must be given together with family, got {self.preset[0]}")
        with rehearsing(self.rehearse):
            models = self.models()
            for model in models:
                self.ways(model)  # refuses numbers of blocks that there cannot be
        if all(self.target_of(model.preset) for model in models):
            return  # nothing runs
        if self.on.type == "cpu" and not self.rehearse:
            if "cpu" in self.offload:
                raise ValueError("offload must be none on a CPU, which is its own host, got cpu")
            if "graph" in self.launch:
                raise ValueError("launch must be ops on a CPU, got graph")
        needed = 2 * max(count for model in models for count in self.counts(model))
        if self.rounds is not None and self.rounds < needed:
            raise ValueError(
                f"rounds must be at least {needed}, two steps of each block, got {self.rounds}"
            )

    def models(self) -> list[Recipe]:
        """What is trained, on what device; the samples are made up."""
        on_gpu = self.on.type == "cuda"
        families = [self.family] if self.family else ["dit"] if on_gpu else list(SMALL)
        return [
            replace(
                recipe,
                batch_size=self.batch,
                autocast=dtype == "autocast",
                device=self.target_of(name) or target_of(self.on),
            )
            for family in families
            for name in self.preset or (LARGE if on_gpu else SMALL).get(family, SMALL[family])
            for recipe in _with_words(of_preset(family, name), self.words)
            for dtype in self.dtype or (DTYPES[on_gpu or _is_large(name)],)
        ]

    def target_of(self, preset: str) -> Target | None:
        """The device that a model is predicted for; None where it runs."""
        if self.target == "this":
            return target_of(self.on)
        if self.target != "auto":
            return target_named(self.target)
        return self.gpu("auto") if _is_large(preset) and self.on.type == "cpu" else None

    def name_of(self, model: Recipe) -> str:
        """Of the device in a row."""
        told = self.target != "this" and self.target_of(model.preset)
        return told.name.upper() if told else device_name(self.on)

    def about(self, model: Recipe) -> Row:
        """What the rows of a model have in common."""
        here, name = machine(self.on) | {"command": called()}, self.name_of(model)
        return here if here["device"] == name else here | {"device": name, "driver": None}

    def counts(self, model: Recipe) -> Sequence[int]:
        """Numbers of blocks to cut a model into."""
        return self.num_blocks or [count for count in BLOCKS if count <= model.model.depth]

    def ways(self, model: Recipe) -> list[Recipe]:
        """Every way that is asked for to train a model, in the order of the methods.

        End to end comes once, and block by block for each number of blocks, of which 1 of the fused
        layers is end to end too. The optimizer is in the backward only where memory is the aim: end
        to end, checkpointed, and the fused layers with no other block on the device.
        """
        here = self.target_of(model.preset) is None and self.on.type == "cpu"
        places = self.offload or (("none",) if here else OFFLOAD)
        policies = self.recompute or policies_of(mixed=model.autocast)
        lean = ("end_to_end", "checkpointed")
        return [
            replace(
                model,
                method=method,
                num_blocks=count,
                recompute=recompute,
                budget=budget,
                offload=place,
                optimizer_in_backward=in_backward,
                cuda_graphs=launch == "graph",
            )
            for method in self.methods
            for fused in [method == "block_fused"]
            for count in (self.counts(model) if method in BLOCKWISE else (1,))
            if not repeats(model.family, self.methods, method, count)
            for budget in (self.budgets if method == "compiled" else (None,))
            # one block is all that there is
            for place in (places if fused and count > 1 else ("none",))
            if place in offloads_of(model.model, count)
            if place == "none" or count in (self.offload_at or self.counts(model))
            for recompute in (policies if fused else (None,))
            for is_lean in [method in lean or (fused and (place == "cpu" or count == 1))]
            for in_backward in (self.optimizer_in_backward if is_lean else (False,))
            for launch in (self.launch if fused else ("ops",))
        ]

    def key_of(self, recipe: Recipe) -> Row:
        """What a row is known by."""
        return described(recipe) | {"device": self.name_of(recipe)}

    def wanted(self) -> list[Row]:
        return [self.key_of(recipe) for model in self.models() for recipe in self.ways(model)]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        """Raises SystemExit, which names the ways that failed."""
        beside = preparing(self.on, self.rehearse) if self.beside else nullcontext()
        failed: list[str] = []
        with rehearsing(self.rehearse), beside as ready:
            todo = {
                model: [way for way in self.ways(model) if known.lacks(self.key_of(way))]
                for model in self.models()
            }
            running = [model for model in todo if self.target_of(model.preset) is None]
            for model in running if ready else ():
                ready.compile(todo[model])
                if self.nearest is not None:  # which is waited for before anything else
                    ready.predict(candidates(model, self.nearest))
                ready.predict(todo[model])
            for model, every in todo.items():
                about = self.about(model)
                if model not in running:
                    yield predicted_rows(every, about)
                    continue
                if self.nearest is not None:
                    nearest = ready.nearest(model, self.nearest)
                    every += [nearest] if nearest and nearest not in every else []
                    ready.compile(every)
                yield measured_rows(every, self, ready, about, failed)
        if failed:
            raise SystemExit(f"failed: {'; '.join(failed)}")


def _is_large(preset: str) -> bool:
    return any(preset in names for names in LARGE.values())


def _with_words(recipe: Recipe, words: Sequence[int]) -> list[Recipe]:
    """A recipe with each of some vocabularies; itself where there is none."""
    models = [replace(recipe.model, vocabulary=count) for count in words] or [recipe.model]
    return [replace(recipe, model=model) for model in models]


def predicted_rows(every: Sequence[Recipe], about: Row) -> Iterator[Row]:
    """One row for each way, without times.

    Args:
        every:  way, and the device that is predicted
        about:  the machine
    """
    for recipe, prediction in zip(every, predicted(every), strict=True):
        runs = {"implementation": ON_A_GPU.get(recipe.method, "torch")}
        yield described(recipe) | figures_of(recipe, prediction) | UNTIMED | runs | about


def measured_rows(
    every: Sequence[Recipe],
    options: Options,
    ready: Preparation | None,
    about: Row,
    failed: list[str],
) -> Iterator[Row]:
    """One row for each way; those that do not fit the device are predicted for it.

    Args:
        every:    way
        options:  device, rounds, and whether a row without times comes as a way is weighed
        ready:    whose predictions stand beside what is measured; it rests before a step is timed
        about:    the machine
        failed:   ways that raise something else than that memory is out are added, and left out
    """
    device, missing = options.on, []
    early = options.early and (options.json or options.out)
    for _, group in groupby(sorted(every, key=_apart), _apart):
        together = list(group)
        # a function is recompiled for so many shapes only before it is left in plain torch
        torch.compiler.reset()
        steps, rows = {}, {}
        for recipe in together:
            prediction = ready.figures(recipe) if ready else None
            trainers = [each.trainer for each in steps.values()]
            try:
                made = make_steps(recipe, device, steps)
                figures = weigh(recipe, made, trainers, prediction)
            except Exception as error:  # whatever it is, the other ways are worth their minutes
                if out_of_memory(error):
                    missing.append(recipe)
                    continue
                print(f"{named(recipe)} failed:", file=sys.stderr)
                traceback.print_exc()
                failed.append(named(recipe))
            else:
                steps[recipe] = made
                told = {f"predicted_{name}": prediction and prediction[name] for name in PEAKS}
                runs = {"implementation": implementation_of(recipe, device)}
                rows[recipe] = described(recipe) | figures | told | runs
                if early:
                    yield rows[recipe] | UNTIMED | about
        if not steps:
            continue
        if ready:
            ready.wait()
        dtype = torch.bfloat16 if together[0].autocast else torch.float32  # of the matmuls
        before = ceilings(device, dtype)
        timed = _timed(steps, device, options.rounds or ROUNDS[device.type])
        ceiling = faster(before, ceilings(device, dtype))
        for recipe, times in timed.items():
            achieved = rows[recipe]["flops"] / times["step_ms"] / 1e9
            rates = (achieved, achieved / ceiling["matmul_tflops"])
            yield rows[recipe] | times | dict(zip(RATES, rates, strict=True)) | ceiling | about
        for each in steps.values():
            each.trainer.close()
    for recipe in missing:
        print(f"{named(recipe)} does not fit the device, and is predicted", file=sys.stderr)
    yield from predicted_rows(missing, about) if missing else ()


def _apart(recipe: Recipe) -> int:
    """Equal for ways whose steps are interleaved.

    All that have everything on the device; apart from them, by number of blocks, those with one
    block there, as each has all the others on the host for itself.
    """
    return 0 if recipe.offload == "none" else recipe.num_blocks


def _timed(steps: dict[Recipe, Steps], device: torch.device, rounds: int) -> dict[Recipe, Row]:
    for recipe, of in steps.items():
        if recipe.cuda_graphs:  # each block has had its first steps when it was weighed, without
            of.sweep()
            of.sweep()
    # a step reads its loss, for which a captured graph cannot wait
    samples = measure.samples(steps, device=device, rounds=rounds, capture=False)
    found = {}
    for recipe, (milliseconds, timing) in samples.items():
        times = step_times(milliseconds, steps[recipe].visited[-rounds:])
        found[recipe] = times | {
            "samples_per_second": 1e3 * recipe.batch_size / times["step_ms"],
            "rounds": rounds,
            "timing": timing,
        }
        if recipe.offload == "cpu":
            found[recipe] |= _swap(steps[recipe].trainer)
    return found


def _swap(trainer: Trainer) -> Row:
    """How long it takes to bring a block to the host and another from there, by wall clock."""
    seconds = [trainer.offloader.swap_seconds() for _ in range(SWAPS)]
    sizes = [
        sum(tensor.nbytes for tensor in group.tensors())
        for name, group in trainer.groups.items()
        if name != SHARED
    ]
    return {"swap_ms": 1e3 * statistics.median(seconds), "swap_bytes": 2 * max(sizes)}


if __name__ == "__main__":
    main(Options)
