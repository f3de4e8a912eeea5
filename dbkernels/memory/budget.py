"""Budgets of memory: what a step may need, and the difference by category when it needs more.

A file of budgets is JSON, a list of

    {"settings": {...}, "peak_allocated_bytes": ..., "by_category": {...}}

of which this file knows the bytes. What the settings mean, their reader knows.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from dbkernels.memory.predict import Prediction, predict_peak
from dbkernels.memory.trace import CATEGORIES
from dbkernels.memory.workspace import target_named

GROWTH = 0.01  # of a peak, from which on it is told
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
Settings = dict[str, str | int | bool | None]


def bytes_from(text: str, *, name: str = "memory") -> int:
    """Bytes from a number and its unit, such as 24GiB or "1.5 GiB".

    Args:
        text:  the number is positive
        name:  of what is asked for, for the message
    Raises:
        ValueError: it is anything else.
    """
    found = re.fullmatch(rf"(\d+\.?\d*|\.\d+) ?({'|'.join(UNITS)})", text.strip(), re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        units = ", ".join(UNITS)
        raise ValueError(
            f"{name} must be a positive number and one of {units}, such as 24GiB, got {text}"
        )
    return size


def in_words(size: int) -> str:
    """Bytes with the largest unit of which there is one, three digits of them or more."""
    unit = next((unit for unit in reversed(UNITS) if abs(size) >= UNITS[unit]), "KiB")
    value = size / UNITS[unit]
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


@dataclass(frozen=True)
class Budget:
    """What a step of some settings may need.

    Args:
        settings:              flat, as JSON has them
        peak_allocated_bytes:  of the step
        by_category:           bytes of each of CATEGORIES at the peak; they add up to it
    """

    settings: Settings
    peak_allocated_bytes: int
    by_category: dict[str, int]

    def growth(self, now: "Budget") -> float:
        """Of the peak, as a share of this one."""
        return now.peak_allocated_bytes / self.peak_allocated_bytes - 1


def read_budgets(path: Path) -> list[Budget]:
    """The budgets of a file.

    Raises:
        ValueError: it holds something else; the message names the row, counted from 1.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of budgets, got {_shortened(rows)}")
    return [_budget(row, f"row {i} of {path}") for i, row in enumerate(rows, 1)]


def write_budgets(path: Path, budgets: Sequence[Budget]) -> None:
    """Write a file of budgets, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps([asdict(budget) for budget in budgets], indent=2) + "\n")
    os.replace(temporary, path)


def _budget(row: object, where: str) -> Budget:
    names = [field.name for field in fields(Budget)]
    if not isinstance(row, dict) or set(row) != set(names):
        got = ", ".join(row) or "nothing" if isinstance(row, dict) else _shortened(row)
        raise ValueError(f"{where} must have {', '.join(names)} and no more, got {got}")
    budget = Budget(**row)
    if not isinstance(budget.settings, dict):
        raise ValueError(f"settings in {where} must be by name, got {_shortened(budget.settings)}")
    _check_bytes(budget, where)
    return budget


def _check_bytes(budget: Budget, where: str) -> None:
    parts, peak = budget.by_category, budget.peak_allocated_bytes
    if not isinstance(parts, dict) or set(parts) != set(CATEGORIES):
        got = ", ".join(parts) or "nothing" if isinstance(parts, dict) else _shortened(parts)
        raise ValueError(f"by_category in {where} must be of {', '.join(CATEGORIES)}, got {got}")
    if any(type(size) is not int or size < 0 for size in (*parts.values(), peak)):
        raise ValueError(f"bytes in {where} must be whole numbers, got {_shortened(parts)}")
    if not 0 < peak == sum(parts.values()):
        raise ValueError(
            f"peak_allocated_bytes in {where} must be what by_category adds up to, "
            f"got {peak} and {sum(parts.values())}"
        )


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_within(
    step: Callable[[], object],
    *,
    model: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    inputs: Sequence[Tensor] = (),
    ceiling: int | str,
    target: str = "cpu",
) -> Prediction:
    """Hold a training step to a ceiling. It runs twice, and the second time is followed.

    The first time makes the optimizers' state, which every later step finds there.

    Args:
        step:        on the CPU, with real tensors, or with fake ones and their mode on
        model:       what it trains
        optimizers:  that it steps
        inputs:      tensors of the caller that stay alive
        ceiling:     bytes, or a number and its unit such as "1.5 GiB"
        target:      device whose allocator and workspaces are predicted, such as h100
    Returns:
        The prediction of the step.
    Raises:
        AssertionError: it needs more; the message has what is alive at the peak, by category.
        ValueError: the model is not on the CPU, or an argument has a value that it cannot have.
    """
    # pytest's name for "show the caller's line instead"
    __tracebackhide__ = True
    limit = bytes_from(ceiling, name="ceiling") if isinstance(ceiling, str) else ceiling
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if devices != ["cpu"]:
        raise ValueError(f"model must be on the CPU, got one on {', '.join(devices) or 'nothing'}")
    device = target_named(target)
    step()
    found = predict_peak(step, model=model, optimizers=optimizers, inputs=inputs, target=device)
    if found.peak_allocated_bytes > limit:
        raise AssertionError(_excess(found, limit))
    return found


def _excess(found: Prediction, limit: int) -> str:
    peak = found.peak_allocated_bytes
    lines = [
        f"the step needs {in_words(peak)} at its peak ({found.at}), "
        f"{in_words(peak - limit)} more than the ceiling of {in_words(limit)}:"
    ]
    parts = sorted(found.by_category.items(), key=lambda part: -part[1])
    lines += [
        f"  {name.replace('_', ' '):<18} {in_words(size):>10}  {size / peak:4.0%}"
        for name, size in parts
        if size
    ]
    return "\n".join(lines)
