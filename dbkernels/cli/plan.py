"""`python -m dbkernels plan`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from dbkernels.cli.plan_search import Answer, Question, answer
from dbkernels.cli.plan_tables import rows, show
from dbkernels.memory.budget import bytes_from, in_words
from dbkernels.memory.workspace import target_named
from dbkernels.models.registry import DEFAULT_FAMILY, FamilyName, family_named


@dataclass(frozen=True)
class Plan:
    """Say what limits a run, and which ways of training fit a device, the fastest first.

    All of it is predicted, peak memory by dry runs of the steps and time by a stated formula; no
    GPU is needed.
    """

    memory: str
    """Memory of the device: a number and one of KiB, MiB, GiB, TiB, such as 24GiB."""
    family: FamilyName = DEFAULT_FAMILY
    """vit classifies images; dit generates them."""
    preset: str = "digits"
    """Sizes of the model; vit: cifar100, digits; dit: S/2, B/2, L/2, XL/2, digits."""
    batch: int = 128
    """Samples of a step; a plan may cut them into micro-batches."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    target: str = "h100"
    """The device that is predicted: cpu, a100, h100, h200, b200."""
    json: bool = False
    """Print one JSON object a line instead of tables."""

    def run(self) -> None:
        question = self._question()
        with _progress() as advance:
            found = answer(question, advance)
        if not found.plans:
            raise ValueError(_nothing_fits(question, found))
        found_rows = list(rows(question, found))
        if self.json:
            for row in found_rows:
                print(json.dumps(row))
        else:
            show(question, found_rows, Console(highlight=False))

    def _question(self) -> Question:
        memory = bytes_from(self.memory)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        family_named(self.family).model.preset(self.preset)
        target = target_named(self.target)
        return Question(self.family, self.preset, self.batch, self.autocast, target.name, memory)


def _nothing_fits(question: Question, found: Answer) -> str:
    """One sentence: the smallest plan, what it needs, and what would fit instead."""
    least = found.smallest
    needed = least.estimate.peak_bytes + question.context
    instead = "no preset of the family fits"
    if found.largest:
        instead = f"the largest preset of the family that fits is {found.largest}"
    return (
        f"memory must be at least {in_words(needed)} for {question.family} {question.preset} at "
        f"batch {question.batch}, got {in_words(question.memory)}: that is its smallest plan, "
        f"num_blocks {least.setting.num_blocks}, offload {least.offload}, recompute "
        f"{least.setting.recompute}, micro-batch {least.setting.micro_batch}; {instead}"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A bar on stderr that goes when all is done."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("predicting", total=None)
        yield lambda total: progress.update(task, advance=1, total=total)
