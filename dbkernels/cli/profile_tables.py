"""The rows of `python -m dbkernels profile`, and budgets, as tables that fit a terminal."""

from collections.abc import Iterator

from rich.table import Table

from dbkernels.cli.table import table
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.memory.units import UNITS, in_words, three_digits, unit_of
from dbkernels.planning.budgets import GROWTH, Held

FEW = 12  # rows that are shown one below the other
OP = 24  # letters of an op's name that have room
NAMES = ("param", "grad", "optim", "input", "saved", "temp", "work")
SHORT = dict(zip(CATEGORIES, NAMES, strict=True))
Row = dict[str, object]


def predicted_tables(rows: list[Row]) -> Iterator[Table]:
    """Peaks and operations by number of blocks, and where rows are few, what the peaks are."""
    rows = _distinct(rows)
    first, unit = rows[0], _unit(rows)
    compute = "bfloat16" if first["autocast"] else "float32"
    title = f"{first['family']} {first['preset']}, batch {first['batch']}, {compute} compute"
    title += ",\noptimizer in backward" if first["optimizer_in_backward"] else ""
    for name in ("allocated", "reserved"):
        caption = f"{title}\npredicted peak {name}, {unit}, on {first['target']}"
        yield _by_blocks(rows, caption, f"peak_{name}_bytes", UNITS[unit])
    once = [row for row in rows if row["offload"] == first["offload"]]
    yield _by_blocks(once, "operations of a step, 10^9", "flops", 10**9)
    if len(rows) <= FEW:
        yield _by_category(rows, unit)


def _by_blocks(rows: list[Row], title: str, name: str, unit: int) -> Table:
    """A column for each number of blocks, so that the table stays narrow."""
    counts = sorted({row["num_blocks"] for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        line = lines.setdefault((_name(row), _offload(row)), dict.fromkeys(counts, ""))
        line[row["num_blocks"]] = three_digits(row[name] / unit)
    cells = ((*names, *line.values()) for names, line in lines.items())
    return table(["number of blocks", "offload", *map(str, counts)], cells, names=2, title=title)


def _by_category(rows: list[Row], unit: str) -> Table:
    """A row for each of a few: what is alive at its peak, and below it the op."""
    title = f"what is alive at the peak, {unit}, and the op"
    cells = (
        (
            f"{_name(row)}, {_blocks(row)}\n  {_op(row['at'])}",
            *(three_digits(row["by_category"][name] / UNITS[unit]) for name in CATEGORIES),
        )
        for row in rows
    )
    return table(["", *SHORT.values()], cells, title=title)


def _op(at: str) -> str:
    """The op without its namespace, cut to its column."""
    phase, _, op = at.partition(": ")
    name = op.partition("::")[2].removeprefix("_scaled_dot_product_")
    return f"{phase}: {name[:OP]}" if op else phase


def measured_tables(rows: list[Row]) -> Iterator[Table]:
    """Predicted beside measured, with nothing of what was not measured."""
    rows = _distinct(rows)
    unit = _unit(rows)
    title = f"peak allocated of a step, {unit}, and its time without swaps, ms"
    lines = []
    for row in rows:
        predicted, measured = row["peak_allocated_bytes"], row.get("measured_allocated_bytes")
        cells = [_name(row), _blocks(row), three_digits(predicted / UNITS[unit])]
        if measured is not None:
            cells += [three_digits(measured / UNITS[unit]), f"{predicted / measured - 1:+.1%}"]
            cells += [three_digits(row[f"seconds_per_{of}"] * 1e3) for of in ("step", "sweep")]
        lines.append(cells)
    columns = ("", "blocks", "predicted", "measured", "off by", "step", "sweep")
    yield table(columns, lines, names=2, title=title)


def not_measured(rows: list[Row]) -> Iterator[str]:
    """A sentence for each that was to be measured and could not be."""
    for row in _distinct(rows):
        if "not_measured" in row:
            yield f"{_name(row)}, {_blocks(row)} was not measured: {row['not_measured']}"


def budget_tables(found: list[Held], *, updated: bool) -> Iterator[Table | str]:
    """Budgets beside the peaks of now, and by category those that have changed."""
    yield "predicted peaks beside their budgets"
    lines = []
    for each in found:
        sizes = (of.peak_allocated_bytes for of in (each.budget, each.now))
        lines.append((_settings(each), *map(in_words, sizes), f"{each.growth:+.1%}"))
    yield table(("", "budget", "now", "change"), lines)
    for each in found:
        if abs(each.growth) > GROWTH:
            yield f"\n{_settings(each)}, by category at the peak"
            yield table(("", "budget", "now", "difference"), _differences(each))
    lower = sum(each.growth < -GROWTH for each in found)
    if updated:
        yield "The peaks of now are the budgets from here on."
    elif lower:
        yield f"{lower} of the budgets may be lowered: add --update."


def _differences(each: Held) -> Iterator[tuple[str, ...]]:
    for category in CATEGORIES:
        old, new = (of.by_category[category] for of in (each.budget, each.now))
        change = f"{'-' if new < old else '+'}{in_words(abs(new - old))}" if new != old else ""
        sizes = (in_words(size) if size else "" for size in (old, new))
        yield category.replace("_", " "), *sizes, change


def _settings(each: Held) -> str:
    """All of a budget's settings that a row of a table has room for."""
    row = each.budget.recipe.settings()
    compute = " bf16" if row["autocast"] else ""
    early = " in-backward" if row["optimizer_in_backward"] else ""
    offload = "" if row["offload"] == "none" else f", offload {row['offload']}"
    return (
        f"{row['family']} {row['preset']} {row['batch']}{compute}{early} {row['target']}, "
        f"{row['num_blocks']} x {row['recompute'] or row['method'].replace('_', ' ')}{offload}"
    )


def _unit(rows: list[Row]) -> str:
    """What all sizes are told in."""
    return unit_of(max(row["peak_allocated_bytes"] for row in rows))


def _distinct(rows: list[Row]) -> list[Row]:
    """The first of the rows that would be told by the same words."""
    first: dict[tuple, Row] = {}
    for row in rows:
        first.setdefault((_name(row), _offload(row), row["num_blocks"]), row)
    return list(first.values())


def _offload(row: Row) -> str:
    """none or cpu; nothing end to end, where there is no other block."""
    return row["offload"] if row["method"].startswith("block") else ""


def _blocks(row: Row) -> str:
    return f"{row['num_blocks']}{', offload' if _offload(row) == 'cpu' else ''}"


def _name(row: Row) -> str:
    name = row["method"].replace("_", " ").replace("block ", "")
    return f"{name} {row['recompute']}" if row["recompute"] else name
