"""The search of `python -m dbkernels plan`, in a process for each processor."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial

from dbkernels.cli.preset_run import preset_run
from dbkernels.memory.workspace import Target, target_named
from dbkernels.models.registry import FAMILIES
from dbkernels.ops.layer.recompute import Recompute, policies_of
from dbkernels.training.estimate import Estimate, estimate
from dbkernels.training.plan import (
    CONTEXT,
    SPEEDS,
    Found,
    Plan,
    outside_layers,
    plans_of,
    smallest_setting,
)
from dbkernels.training.run import RunConfig


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Args:
        family:    of the model
        preset:    of the family
        batch:     samples of a step
        autocast:  whether it computes in bfloat16
        target:    name of the device
        memory:    bytes of the device
    """

    family: str
    preset: str
    batch: int
    autocast: bool
    target: str
    memory: int

    @property
    def context(self) -> int:
        """Bytes of the device that no tensor can have."""
        return CONTEXT if target_named(self.target).is_gpu else 0

    @property
    def limit(self) -> int:
        """Bytes that a plan may take."""
        return self.memory - self.context

    def config(self, preset: str) -> RunConfig:
        """The run of one of the family's presets."""
        return preset_run(self.family, preset, batch=self.batch, autocast=self.autocast)

    @property
    def policies(self) -> tuple[Recompute, ...]:
        """What a layer's backward may compute again."""
        return policies_of(mixed=self.autocast)


@dataclass(frozen=True)
class Answer:
    """What was found.

    Args:
        whole:     end to end, nothing computed again, the batch not cut; it need not fit
        plans:     that fit, the fastest first
        smallest:  of all that were predicted
        largest:   the family's largest preset of which something fits; None where there is none
        outside:   bytes of the stem and the head, by category
    """

    whole: Plan
    plans: list[Plan]
    smallest: Plan
    largest: str | None
    outside: dict[str, int]


def answer(question: Question, advance: Callable[[int], None]) -> Answer:
    """Plan.

    Args:
        question:  its preset exists
        advance:   is told how many predictions are under way in all, and called as each is done
    """
    depth = question.config(question.preset).model.depth
    counts = [count for count in range(1, depth + 1) if depth % count == 0]
    presets = sorted(
        FAMILIES[question.family].model.presets, key=partial(_size, question), reverse=True
    )
    jobs = [partial(_found, question, count) for count in counts]
    jobs += [partial(_least, question, preset) for preset in presets]
    results: dict[int, Found | dict] = {}
    for index, result in _run(jobs):
        results[index] = result
        advance(len(jobs))
    found = [results[i] for i in range(len(counts))]
    least = [results[i] for i in range(len(counts), len(jobs))]
    plans = sorted((plan for each in found for plan in each.fitting), key=lambda p: p.seconds)
    fits = (
        preset
        for preset, several in zip(presets, least, strict=True)
        if min(estimate.peak_bytes for estimate in several.values()) <= question.limit
    )
    return Answer(
        whole=found[0].whole,
        plans=plans,
        smallest=min((each.smallest for each in found), key=lambda p: p.estimate.peak_bytes),
        largest=next(fits, None),
        outside=outside_layers(least[presets.index(question.preset)], depth),
    )


def _run(jobs: list[partial]) -> Iterator[tuple[int, object]]:
    """Each job's place and result, as they are done."""
    # a forked process would inherit torch's threads without their locks
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), context) as pool:
        places: dict[Future, int] = {pool.submit(job): i for i, job in enumerate(jobs)}
        for done in as_completed(places):
            yield places[done], done.result()


def _size(question: Question, preset: str) -> int:
    model = question.config(preset).model
    return model.depth * model.dim**2


def _found(question: Question, num_blocks: int) -> Found:
    config, target = question.config(question.preset), _target(question)
    speed = SPEEDS[question.target]
    return plans_of(
        num_blocks,
        partial(estimate, config=config, target=target),
        batch=question.batch,
        limit=question.limit,
        seconds=partial(speed.seconds, autocast=question.autocast),
        policies=question.policies,
    )


def _least(question: Question, preset: str) -> dict[str, Estimate]:
    """The least that a preset needs."""
    config = question.config(preset)
    setting = smallest_setting(config.model.depth, question.policies)
    return estimate(setting, config, _target(question))


def _target(question: Question) -> Target:
    return target_named(question.target)
