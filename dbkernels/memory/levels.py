"""What is alive op after op, in few numbers: a step's highest moments, for those who draw it."""

from dataclasses import dataclass
from itertools import groupby, pairwise

from dbkernels.memory.predict import Prediction
from dbkernels.memory.trace import CATEGORIES, START


@dataclass(frozen=True)
class Levels:
    """A step in parts of as many ops each, every part at its highest moment.

    Only ops that allocate or free count; before the first of them stands what is there already.
    """

    starts: list[int]  # first op of each part
    by_category: dict[str, list[int]]  # bytes of each of CATEGORIES, a number for each part
    phases: list[tuple[str, int]]  # such as "forward", and its first op

    @property
    def totals(self) -> list[int]:
        """Bytes of all categories, of each part."""
        return [sum(part) for part in zip(*self.by_category.values(), strict=True)]


def levels(prediction: Prediction, *, parts: int) -> Levels:
    """Follow a predicted step.

    Args:
        prediction:  of the step
        parts:       at most so many; a step with fewer ops has one for each
    Raises:
        ValueError: parts is below 1.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    columns, phases = _columns(prediction)
    parts = min(parts, len(columns))
    edges = [part * len(columns) // parts for part in range(parts + 1)]
    highest = [max(columns[start:end], key=sum) for start, end in pairwise(edges)]
    return Levels(
        starts=edges[:-1],
        by_category=dict(zip(CATEGORIES, map(list, zip(*highest, strict=True)), strict=True)),
        phases=_first_ops(phases),
    )


def _columns(prediction: Prediction) -> tuple[list[tuple[int, ...]], list[str]]:
    """Bytes of each category at the highest moment of each op, and each op's phase."""
    trace = prediction.blocks
    columns, phases = [], []
    for op, moments in groupby(trace.moments(), key=lambda moment: moment.op):
        columns.append(max(moments, key=lambda moment: moment.total_bytes).by_category)
        phases.append("" if op == START else trace.name(op).partition(":")[0])
    last = max((i for i, phase in enumerate(phases) if phase == "backward"), default=len(phases))
    # what follows is the norm of the gradients, and the optimizer
    phases[last + 1 :] = ["update"] * len(phases[last + 1 :])
    return columns, phases


def _first_ops(phases: list[str]) -> list[tuple[str, int]]:
    """Each run of one phase, and where it begins."""
    found, start = [], 0
    for phase, ops in groupby(phases):
        if phase:
            found.append((phase, start))
        start += len(list(ops))
    return found
