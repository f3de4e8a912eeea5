"""`python -m dbkernels profile`, and its rows and budgets as tables that fit a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from dbkernels.cli.device import pick_device
from dbkernels.cli.preset import OfPreset, devices_of
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.table import Row, show, table
from dbkernels.memory.allocator import target_named, target_of
from dbkernels.memory.timeline import draw, write_timeline
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.memory.units import UNITS, in_words, three_digits, unit_of
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning import budgets
from dbkernels.planning.dry_run import dry_run, predicted, row_of
from dbkernels.planning.measure import measured
from dbkernels.planning.recipe import (
    BLOCKWISE,
    METHODS,
    OFFLOAD,
    Recipe,
    repeats,
)
from dbkernels.settings import check_number
from dbkernels.training.trainer_config import Offload

FEW = 12  # rows that are shown one below the other
OP = 24  # letters of an op's name that have room
Name = TypeVar("Name", bound=str)
SHORT = ("param", "grad", "optim", "input", "saved", "temp", "work")


@dataclass(frozen=True, kw_only=True)
class Profile(OfPreset):
    """Predict the peak memory and the operations of one training step; needs no GPU.

    Every method, recompute policy and number of blocks has a row, with all blocks on the
    device and with one. With --measure the same steps are run for real beside it.
    """

    num_blocks: str = "1,2,3,4,6"
    """Numbers of blocks with commas between."""
    methods: str = ",".join(METHODS)
    """What is trained, with commas between; all but block_fused run the layer in plain torch. End
    to end is the network without noise, where the family has one."""
    recompute: str = ",".join(POLICIES)
    """What the fused layer's backward computes again: from most memory to most arithmetic."""
    offload: str = ",".join(OFFLOAD)
    """none: all blocks and their optimizers' state are on the device; cpu: one block at a time."""
    budget: float = 0.5
    """Share of its activations that the compiled baseline may keep."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as the backward has its gradient, and free the gradient."""
    offload_activations: bool = False
    """Keep what the backward needs in host memory until it comes to it."""
    target: str = "auto"
    """The device that is predicted: cpu, a100, h100, h200, b200; auto is h100, or the measured."""
    measure: bool = False
    """Run the steps for real too; on a CPU not compiled code, nor what is partly off the device."""
    steps: int = 5
    """Steps that are timed, of every block, where they are run."""
    device: str = "auto"
    """Where they are run: auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    timeline: Path | None = None
    """Write the one step that is asked for as a snapshot for pytorch.org/memory_viz."""
    picture: Path | None = None
    """Draw the one step that is asked for: live bytes by category, op after op; .png, .svg."""
    check: Path | None = None
    """Predict the rows of this file of budgets instead; fail where a peak has grown by 1 %."""
    update: bool = False
    """With a file to check: write the peaks of now into the file instead of failing."""
    write: Path | None = None
    """Put the rows that are asked for into this file of budgets, beside those that it has."""

    def run(self) -> None:
        if self.update and not self.check:
            raise ValueError("update must come with check and its file, got none")
        if self.check:
            self._check(self.check)
            return
        check_number("steps", self.steps, 1)
        if not 0 <= self.budget <= 1:
            raise ValueError(f"budget must be from 0 to 1, got {self.budget}")
        recipes = self.recipes()
        if self.timeline or self.picture:
            self._show(recipes)
        rows: dict[Recipe, Row] = {}
        # no step is timed while another process predicts
        for recipe, row in self._measured_rows(recipes) if self.measure else self._rows(recipes):
            rows[recipe] = row
            show([row], (), as_json=self.json)
        if self.write:
            budgets.add(self.write, {recipe: row["by_category"] for recipe, row in rows.items()})
        tables = measured_tables if self.measure else predicted_tables
        show((), tables([*rows.values()]), as_json=self.json)

    def recipes(self) -> list[Recipe]:
        """Every way to train that is asked for, in the order in which it is asked for.

        End to end comes once, block by block for each number of blocks, the fused layer for each
        policy. One block on the device is left out where blocks read each other's layers, unless
        nothing else is asked for.
        """
        try:
            counts = dict.fromkeys(int(count) for count in self.num_blocks.split(","))
        except ValueError:
            raise ValueError(
                f"num_blocks must be whole numbers with commas between, got {self.num_blocks}"
            ) from None
        if self.measure and self.target != "auto":
            raise ValueError(f"target must be auto for measure, got {self.target}")
        if self.measure and (count := self.data_parallel * self.tensor_parallel) > 1:
            raise ValueError(f"devices must be one for measure, got {count}")
        name, device = "h100" if self.target == "auto" else self.target, pick_device(self.device)
        recipe = self.recipe(target_of(device) if self.measure else target_named(name))
        methods = _names("methods", self.methods, METHODS)
        if recipe.tensor_parallel > 1:
            # plain torch cannot be cut; alone it is refused
            methods = [name for name in methods if name == "block_fused"] or methods
        policies = _names("recompute", self.recompute, tuple(POLICIES))
        places = _names("offload", self.offload, OFFLOAD)
        return [
            replace(
                recipe,
                optimizer_in_backward=self.optimizer_in_backward,
                offload_activations=self.offload_activations,
                method=method,
                num_blocks=count,
                recompute=policy,
                budget=self.budget if method == "compiled" else None,
                offload=place,
            )
            for method in methods
            for count in (counts if method in BLOCKWISE else (1,))
            for policy in (policies if method == "block_fused" else (None,))
            if not repeats(recipe.family, methods, method, count)
            for place in _possible(places, replace(recipe, num_blocks=count).offloads)
        ]

    def _rows(self, recipes: list[Recipe]) -> Iterator[tuple[Recipe, Row]]:
        """What is predicted of each, and a line on stderr as it comes."""
        found = (row_of(*each) for each in zip(recipes, predicted(recipes), strict=True))
        yield from zip(recipes, self._told("predicting", found, len(recipes)), strict=True)

    def _measured_rows(self, recipes: list[Recipe]) -> Iterator[tuple[Recipe, Row]]:
        every = list(self._rows(recipes))
        found = (row | self._measured(recipe) for recipe, row in every)
        yield from zip(recipes, self._told("measuring", found, len(recipes)), strict=True)

    def _told(self, told: str, rows: Iterator[Row], count: int) -> Iterator[Row]:
        with ProgressBar(told, count, "rows") as shown:
            shown.step(0)
            for done, row in enumerate(rows, 1):
                shown.step(done)
                shown.say(_line(row))
                yield row

    def _show(self, recipes: list[Recipe]) -> None:
        if len(recipes) != 1:
            raise ValueError(
                "timeline and picture show one step: methods, num_blocks, recompute and offload "
                f"must leave, got {len(recipes)}"
            )
        (recipe,) = recipes
        prediction = dry_run(recipe)[recipe.offload]
        if self.timeline:
            write_timeline(self.timeline, prediction)
        if self.picture:
            blocks = f"{recipe.num_blocks} block{'s' if recipe.num_blocks > 1 else ''}"
            run = f"{recipe.family} {recipe.preset}, batch {recipe.batch_size}"
            draw(self.picture, prediction, title=f"{run}: {_name(recipe.settings())}, {blocks}")

    def _measured(self, recipe: Recipe) -> dict[str, object]:
        """What the recipe's steps take for real; nothing if they cannot tell."""
        device = pick_device(self.device)
        # a CPU's memory also holds what is off the device, and the tracker sees no compiled code
        unseen = recipe.method == "compiled" or recipe.offload == "cpu"
        unseen |= recipe.offload_activations
        return {} if unseen and device.type == "cpu" else measured(recipe, device, self.steps)

    def _check(self, path: Path) -> None:
        """Compare a file's budgets with the peaks of now, and print both."""
        asked, found = budgets.read(path), []
        with ProgressBar("predicting", len(asked), "budgets") as shown:
            shown.step(0)
            for each in budgets.hold(asked):
                found.append(each)
                shown.step(len(found))
                shown.say(f"{_settings(each.recipe)}: {in_words(each.peaks[1])}")
        screen = budget_tables(found, updated=self.update)
        show((each.row() for each in found), screen, as_json=self.json)
        exceeded = sum(each.exceeded for each in found)
        if self.update:
            budgets.write(path, {each.recipe: each.now for each in found})
        elif exceeded:
            raise ValueError(
                f"a peak must grow by at most {budgets.GROWTH:.0%} of its budget in {path}, got "
                f"{max(each.growth for each in found):+.1%}, and {exceeded} of {len(found)} too "
                "high; add --update where that is meant"
            )


def _possible(asked: Sequence[Offload], offloads: Sequence[Offload]) -> Sequence[Offload]:
    """What is asked for and can be; all that is asked for where none can, for it to be refused."""
    return [place for place in asked if place in offloads] or asked


def _names(flag: str, text: str, known: Sequence[Name]) -> list[Name]:
    """Names with commas between, each of which must be known; what is said twice counts once."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} must be of {', '.join(known)}, got {name}")
    return sorted((name for name in known if name in names), key=names.index)


def _line(row: Row) -> str:
    """A row as it comes, before the tables."""
    alone = row["num_blocks"] > 1 and _offload(row) == "cpu"
    offload = ", one on the device" if alone else ""
    blocks = f"{row['num_blocks']} block{'s' * (row['num_blocks'] > 1)}{offload}"
    told = f"{_name(row)}, {blocks}: predicted {in_words(row['peak_allocated_bytes'])}"
    if (size := row.get("measured_allocated_bytes")) is not None:
        told += f", measured {in_words(size)}"
    return told


def predicted_tables(rows: list[Row]) -> Iterator[Table]:
    """Peaks and operations by number of blocks, and where rows are few, what the peaks are."""
    rows = _distinct(rows)
    first, unit = rows[0], unit_of(max(row["peak_allocated_bytes"] for row in rows))
    compute = "bfloat16" if first["autocast"] else "float32"
    title = f"{first['family']} {first['preset']}, batch {first['batch']}, {compute} compute"
    title += f", {first['optimizer']}" if "optimizer" in first else ""
    early, kept = first["optimizer_in_backward"], first.get("offload_activations")
    title += f",\n{devices}" if (devices := devices_of(first)) else ""
    title += ",\noptimizer in backward" if early else ""
    title += ",\nwhat the backward needs off the device" if kept else ""
    for name in ("allocated", "reserved"):
        caption = f"{title}\npredicted peak {name}, {unit}, on {first['target']}"
        yield _by_blocks(rows, caption, f"peak_{name}_bytes", UNITS[unit])
    once = [row for row in rows if row["offload"] == first["offload"]]
    yield _by_blocks(once, "operations of a step, 10^9", "flops", 10**9)
    if len(rows) <= FEW:
        # what is alive at each peak, and below it the op
        lines = []
        for row in rows:
            sizes = (three_digits(row["by_category"][name] / UNITS[unit]) for name in CATEGORIES)
            lines.append((f"{_name(row)}, {_blocks(row)}\n  {_op(row['at'])}", *sizes))
        yield table(["", *SHORT], lines, title=f"what is alive at the peak, {unit}, and the op")


def _by_blocks(rows: list[Row], title: str, name: str, unit: int) -> Table:
    """A column for each number of blocks, so that the table stays narrow."""
    counts = sorted({row["num_blocks"] for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        line = lines.setdefault((_name(row), _offload(row)), dict.fromkeys(counts, ""))
        line[row["num_blocks"]] = three_digits(row[name] / unit)
    cells = ((*names, *line.values()) for names, line in lines.items())
    return table(["number of blocks", "offload", *map(str, counts)], cells, names=2, title=title)


def _op(at: str) -> str:
    """The op without its namespace, cut to its column."""
    phase, _, op = at.partition(": ")
    name = op.partition("::")[2].removeprefix("_scaled_dot_product_")
    return f"{phase}: {name[:OP]}" if op else phase


def measured_tables(rows: list[Row]) -> Iterator[Table | str]:
    """Predicted beside measured, and a sentence for each that could not be measured."""
    rows = _distinct(rows)
    unit = unit_of(max(row["peak_allocated_bytes"] for row in rows))
    title = f"peak allocated of a step, {unit}, and its time without swaps, ms"
    lines, sentences = [], []
    for row in rows:
        predicted, measured = row["peak_allocated_bytes"], row.get("measured_allocated_bytes")
        cells = [_name(row), _blocks(row), three_digits(predicted / UNITS[unit])]
        if measured is not None:
            cells += [three_digits(measured / UNITS[unit]), f"{predicted / measured - 1:+.1%}"]
            cells += [three_digits(row[f"seconds_per_{of}"] * 1e3) for of in ("step", "sweep")]
        elif reason := row.get("not_measured"):
            sentences.append(f"{_name(row)}, {_blocks(row)} was not measured: {reason}")
        lines.append(cells)
    columns = ("", "blocks", "predicted", "measured", "off by", "step", "sweep")
    yield table(columns, lines, names=2, title=title)
    yield from sentences


def budget_tables(found: list[budgets.Held], *, updated: bool) -> Iterator[Table | str]:
    """Budgets beside the peaks of now, and by category those that have changed."""
    yield "predicted peaks beside their budgets; where one has changed, by category"
    lines = []
    for each in found:
        lines.append((_settings(each.recipe), *map(in_words, each.peaks), f"{each.growth:+.1%}"))
        if abs(each.growth) > budgets.GROWTH:
            lines += _differences(each)
    yield table(("", "budget", "now", "change"), lines)
    lower = sum(each.growth < -budgets.GROWTH for each in found)
    if updated:
        yield "The peaks of now are the budgets from here on."
    elif lower:
        yield f"{lower} of the budgets may be lowered: add --update."


def _differences(each: budgets.Held) -> Iterator[tuple[str, ...]]:
    for category in CATEGORIES:
        old, new = each.budget[category], each.now[category]
        sizes = [in_words(size) if size else "" for size in (old, new, new - old)]
        yield f"  {category.replace('_', ' ')}", *sizes[:2], f"{'+' * (new > old)}{sizes[2]}"


def _settings(recipe: Recipe) -> str:
    """All of a budget's settings that a row of a table has room for."""
    row: Row = dict(recipe.settings())
    compute = " bf16" if row["autocast"] else ""
    optimizer = f" {row['optimizer']}" if "optimizer" in row else ""
    early = " in-backward" if row["optimizer_in_backward"] else ""
    early += " activations-off" if "offload_activations" in row else ""
    early += f" {recipe.data_parallel} x {recipe.tensor_parallel}" if recipe.devices > 1 else ""
    early += " shard" if recipe.shard else ""
    offload = "" if row["offload"] == "none" else f", offload {row['offload']}"
    return (
        f"{row['family']} {row['preset']} {row['batch']}{compute}{optimizer}{early} "
        f"{row['target']}, "
        f"{row['num_blocks']} x {row['recompute'] or row['method'].replace('_', ' ')}{offload}"
    )


def _distinct(rows: list[Row]) -> list[Row]:
    """The first of the rows that would be told by the same words."""
    first = {(_name(row), _offload(row), row["num_blocks"]): row for row in reversed(rows)}
    return [*reversed(first.values())]


def _offload(row: Row) -> str:
    """none or cpu; nothing end to end, where there is no other block."""
    return row["offload"] if row["method"].startswith("block") else ""


def _blocks(row: Row) -> str:
    return f"{row['num_blocks']}{', offload' if _offload(row) == 'cpu' else ''}"


def _name(row: Row) -> str:
    name = row["method"].replace("_", " ").replace("block ", "")
    return f"{name} {row['recompute']}" if row["recompute"] else name
