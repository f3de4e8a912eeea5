"""Budgets of peaks: what a step of a recipe may need, in a file, beside what it needs now.

A file of budgets is JSON, a list of

    {"settings": {...}, "peak_allocated_bytes": ..., "by_category": {...}}

with the settings that `Recipe.settings` gives.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkernels.memory.allocator import target_named
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.planning.dry_run import predicted
from dbkernels.planning.recipe import METHODS, Recipe, of_settings, require_names, shortened
from dbkernels.whole_file import write_whole

GROWTH = 0.01  # of a peak, from which on it is told
# what a compiler keeps is its own choice, another in every version
HELD = tuple(method for method in METHODS if method != "compiled")
NAMES = ("settings", "peak_allocated_bytes", "by_category")
Sizes = dict[str, int]  # bytes of each of CATEGORIES at a peak, which they add up to


@dataclass(frozen=True)
class Held:
    """A recipe's budget, and what its step is predicted to need now."""

    recipe: Recipe
    budget: Sizes
    now: Sizes

    @property
    def peaks(self) -> tuple[int, int]:
        """Bytes of the budget, and of now."""
        return sum(self.budget.values()), sum(self.now.values())

    @property
    def growth(self) -> float:
        """Of the peak, as a share of the budget's."""
        budget, now = self.peaks
        return now / budget - 1

    @property
    def exceeded(self) -> bool:
        return self.growth > GROWTH

    def row(self) -> dict[str, object]:
        """Both, for JSON."""
        sizes = dict(zip(("budget_bytes", "peak_allocated_bytes"), self.peaks, strict=True))
        grown = {"growth": self.growth, "by_category": self.now, "exceeded": self.exceeded}
        return self.recipe.settings() | sizes | grown


def hold(budgets: dict[Recipe, Sizes]) -> Iterator[Held]:
    """Predict again what a file of budgets holds, in order, each as it is found."""
    now = (prediction.by_category for prediction in predicted(list(budgets)))
    for each in zip(budgets, budgets.values(), now, strict=True):
        yield Held(*each)


def read(path: Path) -> dict[Recipe, Sizes]:
    """The budgets of a file.

    Raises:
        ValueError: it holds something else, or a budget of what is there no more, or one recipe
                    twice; the message names the row, counted from 1.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of budgets, got {shortened(rows)}")
    found: dict[Recipe, Sizes] = {}
    for index, row in enumerate(rows, 1):
        try:
            recipe, sizes = _budget(row)
            if recipe in found:
                raise ValueError(f"settings must be those of no other row, got {shortened(row)}")
        except ValueError as error:
            raise ValueError(f"row {index} of {path}: {error}") from None
        found[recipe] = sizes
    return found


def add(path: Path, budgets: dict[Recipe, Sizes]) -> None:
    """Put budgets into a file, in place of those of the same recipes.

    Args:
        path:     of the file; it is made where there is none
        budgets:  those of a method that is not HELD are left out
    Raises:
        ValueError: none is left, one is of a device that has no name, or the file that is there
                    holds something else.
    """
    budgets = {recipe: sizes for recipe, sizes in budgets.items() if recipe.method in HELD}
    if not budgets:
        raise ValueError(f"methods to write must be of {', '.join(HELD)}, got none of them")
    for recipe in budgets:
        target_named(recipe.device.name)
    write(path, (read(path) if path.exists() else {}) | budgets)


def write(path: Path, budgets: dict[Recipe, Sizes]) -> None:
    """Write a file of budgets, whole or not at all."""
    parts = ((recipe.settings(), sum(sizes.values()), sizes) for recipe, sizes in budgets.items())
    rows = [dict(zip(NAMES, each, strict=True)) for each in parts]
    write_whole(path, json.dumps(rows, indent=2) + "\n")


def _budget(row: object) -> tuple[Recipe, Sizes]:
    settings: Any
    peak: Any
    parts: Any
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
    return recipe, parts
