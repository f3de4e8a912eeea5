"""Budgets of peaks: what a step of a recipe may need, in a file, beside what it needs now.

A file of budgets is JSON, a list of

    {"settings": {...}, "peak_allocated_bytes": ..., "by_category": {...}}

with the settings that `Recipe.settings` gives.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dbkernels.memory.allocator import target_named
from dbkernels.memory.measure import Prediction
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.planning.dry_run import predicted
from dbkernels.planning.recipe import METHODS, Recipe, of_settings, require_names, shortened
from dbkernels.whole_file import write_whole

GROWTH = 0.01  # of a peak, from which on it is told
# what a compiler keeps is its own choice, another in every version
HELD = tuple(method for method in METHODS if method != "compiled")
NAMES = ("settings", "peak_allocated_bytes", "by_category")


@dataclass(frozen=True)
class Budget:
    """What a step of a recipe may need.

    Args:
        recipe:                of a preset and a method of HELD
        peak_allocated_bytes:  of the step
        by_category:           bytes of each of CATEGORIES at the peak; they add up to it
    """

    recipe: Recipe
    peak_allocated_bytes: int
    by_category: dict[str, int]


def budget_of(recipe: Recipe, found: Prediction) -> Budget:
    """What a recipe needs now."""
    return Budget(recipe, found.peak_allocated_bytes, found.by_category)


@dataclass(frozen=True)
class Held:
    """A budget, and what its step is predicted to need now."""

    budget: Budget
    now: Budget

    @property
    def growth(self) -> float:
        """Of the peak, as a share of the budget's."""
        return self.now.peak_allocated_bytes / self.budget.peak_allocated_bytes - 1

    @property
    def exceeded(self) -> bool:
        return self.growth > GROWTH

    def row(self) -> dict[str, object]:
        """Both, for JSON."""
        return {
            **self.budget.recipe.settings(),
            "budget_bytes": self.budget.peak_allocated_bytes,
            "peak_allocated_bytes": self.now.peak_allocated_bytes,
            "growth": self.growth,
            "by_category": self.now.by_category,
            "exceeded": self.exceeded,
        }


def hold(path: Path) -> list[Held]:
    """Predict again what a file of budgets holds.

    Raises:
        ValueError, OSError: as `read`.
    """
    budgets = read(path)
    recipes = [each.recipe for each in budgets]
    now = map(budget_of, recipes, predicted(recipes))
    return [Held(*each) for each in zip(budgets, now, strict=True)]


def read(path: Path) -> list[Budget]:
    """The budgets of a file.

    Raises:
        ValueError: it holds something else, or a budget of what is there no more; the message names
                    the row, counted from 1.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of budgets, got {shortened(rows)}")
    found = []
    for index, row in enumerate(rows, 1):
        try:
            found.append(_budget(row))
        except ValueError as error:
            raise ValueError(f"row {index} of {path}: {error}") from None
    return found


def add(path: Path, budgets: Sequence[Budget]) -> None:
    """Put budgets into a file, in place of those of the same recipes.

    Args:
        path:     of the file; it is made where there is none
        budgets:  those of a method that is not HELD are left out
    Raises:
        ValueError: none is left, one is of a device that has no name, or the file that is there
                    holds something else.
    """
    budgets = [each for each in budgets if each.recipe.method in HELD]
    if not budgets:
        raise ValueError(f"methods to write must be of {', '.join(HELD)}, got none of them")
    for each in budgets:
        target_named(each.recipe.device.name)
    there = read(path) if path.exists() else []
    write(path, list({each.recipe: each for each in (*there, *budgets)}.values()))


def write(path: Path, budgets: Sequence[Budget]) -> None:
    """Write a file of budgets, whole or not at all."""
    parts = [(b.recipe.settings(), b.peak_allocated_bytes, b.by_category) for b in budgets]
    rows = [dict(zip(NAMES, each, strict=True)) for each in parts]
    write_whole(path, json.dumps(rows, indent=2) + "\n")


def _budget(row: object) -> Budget:
    settings, peak, parts = require_names("a budget", row, NAMES)
    sizes = (*require_names("by_category", parts, CATEGORIES), peak)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError(f"bytes must be whole numbers from 0, got {shortened(sizes)}")
    total = sum(parts.values())
    if not 0 < peak == total:
        raise ValueError(
            f"peak_allocated_bytes must be what by_category adds up to, got {peak} and {total}"
        )
    recipe = of_settings(settings)
    if recipe.method not in HELD:
        raise ValueError(f"method must be of {', '.join(HELD)}, got {recipe.method}")
    return Budget(recipe, peak, parts)
