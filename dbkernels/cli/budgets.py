"""`python -m dbkernels profile --check`: predicted peaks beside the budgets of a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dbkernels.cli.preset_run import preset_run
from dbkernels.cli.profile_rows import METHODS, OFFLOAD, Case, configured, predicted
from dbkernels.memory.budget import (
    GROWTH,
    Budget,
    Settings,
    in_words,
    read_budgets,
    write_budgets,
)
from dbkernels.memory.predict import Prediction
from dbkernels.memory.trace import CATEGORIES
from dbkernels.memory.workspace import target_named
from dbkernels.models.registry import FAMILIES
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.training.partition import partition
from dbkernels.training.run import RunConfig
from dbkernels.training.trainer_config import Offload

Row = dict[str, object]
KINDS = {
    "family": str,
    "preset": str,
    "batch": int,
    "autocast": bool,
    "optimizer_in_backward": bool,
    "target": str,
    "method": str,
    "num_blocks": int,
    "recompute": (str, type(None)),
    "offload": str,
}
# what a compiler keeps is its own choice, another in every version
HELD = tuple(method for method in METHODS if method != "compiled")


@dataclass(frozen=True)
class Held:
    """A budget, and what its step is predicted to need now."""

    budget: Budget
    now: Budget

    @property
    def growth(self) -> float:
        """Of the peak, as a share of the budget's."""
        return self.budget.growth(self.now)

    @property
    def exceeded(self) -> bool:
        return self.growth > GROWTH


def held(path: Path) -> list[Held]:
    """Predict again what a file of budgets holds.

    Raises:
        ValueError: the file holds something else, or a row of it is stale.
        OSError: it cannot be read.
    """
    budgets = read_budgets(path)
    for index, budget in enumerate(budgets, 1):
        _check_settings(budget.settings, f"row {index} of {path}")
    # one dry run tells of both choices of what is on the device
    known: dict[tuple, dict[str, Prediction]] = {}
    found = []
    for budget in budgets:
        key = _key({**budget.settings, "offload": ""})
        if key not in known:
            known[key] = _predicted(budget.settings)
        prediction = known[key][budget.settings["offload"]]
        now = Budget(budget.settings, prediction.peak_allocated_bytes, prediction.by_category)
        found.append(Held(budget, now))
    return found


def check(path: Path, *, update: bool, as_json: bool) -> None:
    """Compare and print; a peak that has grown by more than GROWTH is a mistake.

    Args:
        path:     of the file of budgets
        update:   write the peaks of now into it instead
        as_json:  print one JSON object a line instead of tables
    Raises:
        ValueError: a budget is exceeded, or see `held`.
    """
    found = held(path)
    if as_json:
        for each in found:
            print(json.dumps(_row(each)))
    else:
        console = Console(highlight=False)
        for part in _screen(found, updated=update):
            console.print(part)
    if update:
        write_budgets(path, [each.now for each in found])
        return
    exceeded = sum(each.exceeded for each in found)
    if exceeded:
        raise ValueError(
            f"a peak must grow by at most {GROWTH:.0%} of its budget in {path}, got "
            f"{max(each.growth for each in found):+.1%}, and {exceeded} of {len(found)} too high; "
            "add --update where that is meant"
        )


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put rows of `profile` into a file of budgets, in place of those of the same settings.

    Args:
        path:  of the file; it is made where there is none
        rows:  as `profile --json` prints them; those of a method that is not HELD are left out
    Raises:
        ValueError: no row is left, one is of a device that has no name, or the file that is there
                    holds something else.
    """
    there = read_budgets(path) if path.exists() else []
    budgets = {_key(budget.settings): budget for budget in there}
    rows = [row for row in rows if row["method"] in HELD]
    if not rows:
        raise ValueError(f"methods to write must be of {', '.join(HELD)}, got none of them")
    for row in rows:
        settings = {name: row[name] for name in KINDS}
        target_named(settings["target"])
        budget = Budget(settings, row["peak_allocated_bytes"], row["by_category"])
        budgets[_key(settings)] = budget
    write_budgets(path, list(budgets.values()))


def _key(settings: Settings) -> tuple:
    return tuple(settings.get(name) for name in KINDS)


def _check_settings(settings: Settings, where: str) -> None:
    if set(settings) != set(KINDS):
        got = ", ".join(settings) or "nothing"
        raise ValueError(f"settings in {where} must be {', '.join(KINDS)}, got {got}")
    for name, kind in KINDS.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(settings[name]) not in kinds:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{name} in {where} must be {names}, got {json.dumps(settings[name])}")
    where = f"{where}, which is stale,"
    _require("family", settings["family"], FAMILIES, where)
    _require("method", settings["method"], HELD, where)
    _require("offload", settings["offload"], OFFLOAD, where)
    fused = settings["method"] == "block_fused"
    _require("recompute", settings["recompute"], tuple(POLICIES) if fused else (None,), where)
    try:
        target_named(settings["target"])
        config = _config(settings)
        partition(config.model.depth, config.partition.num_blocks, config.prior)
    except ValueError as error:
        raise ValueError(f"{where} must be of what there is: {error}") from None


def _require(name: str, value: object, known: Sequence[object], where: str) -> None:
    if value not in known:
        names = ", ".join("null" if each is None else str(each) for each in known)
        got = "null" if value is None else value
        raise ValueError(f"{name} in {where} must be of {names}, got {got}")


def _case(settings: Settings) -> Case:
    return Case(settings["method"], settings["num_blocks"], settings["recompute"])


def _config(settings: Settings) -> RunConfig:
    run = preset_run(
        settings["family"],
        settings["preset"],
        batch=settings["batch"],
        autocast=settings["autocast"],
        optimizer_in_backward=settings["optimizer_in_backward"],
    )
    return configured(_case(settings), run)


def _predicted(settings: Settings) -> dict[Offload, Prediction]:
    target = target_named(settings["target"])
    return predicted(_case(settings), _config(settings), budget=1.0, target=target)


def _row(each: Held) -> Row:
    return {
        **each.budget.settings,
        "budget_bytes": each.budget.peak_allocated_bytes,
        "peak_allocated_bytes": each.now.peak_allocated_bytes,
        "growth": each.growth,
        "by_category": each.now.by_category,
        "exceeded": each.exceeded,
    }


def _screen(found: list[Held], *, updated: bool) -> Iterator[Table | str]:
    yield "predicted peaks beside their budgets"
    table = Table(show_edge=False)
    for name in ("", "budget", "now", "change"):
        table.add_column(name, justify="right" if name else "left")
    for each in found:
        sizes = (each.budget.peak_allocated_bytes, each.now.peak_allocated_bytes)
        table.add_row(_name(each), *map(in_words, sizes), f"{each.growth:+.1%}")
    yield table
    for each in found:
        if abs(each.growth) > GROWTH:
            yield f"\n{_name(each)}, by category at the peak"
            yield _difference(each)
    lower = sum(each.growth < -GROWTH for each in found)
    if updated:
        yield "The peaks of now are the budgets from here on."
    elif lower:
        yield f"{lower} of the budgets may be lowered: add --update."


def _difference(each: Held) -> Table:
    table = Table(show_edge=False)
    for name in ("", "budget", "now", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for category in CATEGORIES:
        old, new = (each.budget.by_category[category], each.now.by_category[category])
        change = f"{'-' if new < old else '+'}{in_words(abs(new - old))}" if new != old else ""
        sizes = (in_words(size) if size else "" for size in (old, new))
        table.add_row(category.replace("_", " "), *sizes, change)
    return table


def _name(each: Held) -> str:
    """All of the settings that a row of a table has room for."""
    settings = each.budget.settings
    how = settings["recompute"] or settings["method"].replace("_", " ")
    compute = " bf16" if settings["autocast"] else ""
    early = " in-backward" if settings["optimizer_in_backward"] else ""
    offload = "" if settings["offload"] == "none" else f", offload {settings['offload']}"
    return (
        f"{settings['family']} {settings['preset']} {settings['batch']}{compute}{early} "
        f"{settings['target']}, {settings['num_blocks']} x {how}{offload}"
    )
