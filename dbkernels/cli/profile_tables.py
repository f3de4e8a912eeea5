"""The rows of `python -m dbkernels profile` as tables that fit a terminal."""

from collections.abc import Callable, Iterator

from rich.table import Table

from dbkernels.memory.trace import CATEGORIES

FEW = 12  # rows that are shown one below the other
OP = 24  # letters of an op's name that have room
SHORT = {
    "parameters": "param",
    "gradients": "grad",
    "optimizer": "optim",
    "inputs": "input",
    "saved_activations": "saved",
    "temporaries": "temp",
    "workspaces": "work",
}
TITLE = 56  # columns: the longest title has its line
Row = dict[str, object]


def predicted_tables(rows: list[Row]) -> Iterator[Table]:
    """Peaks and operations by number of blocks, and where rows are few, what the peaks are."""
    first, rows = rows[0], _distinct(rows)
    compute = "bfloat16" if first["autocast"] else "float32"
    title = f"{first['family']} {first['preset']}, batch {first['batch']}, {compute} compute"
    title += ",\noptimizer in backward" if first["optimizer_in_backward"] else ""
    size, unit = _unit(rows)

    def bytes_of(name: str) -> Callable[[Row], str]:
        return lambda row: _short(row[name] / size)

    for name in ("allocated", "reserved"):
        caption = f"{title}\npredicted peak {name}, {unit}, on {first['target']}"
        yield _by_blocks(rows, caption, bytes_of(f"peak_{name}_bytes"))
    yield _by_blocks(
        [row for row in rows if row["offload"] == rows[0]["offload"]],
        "operations of a step, 10^9",
        lambda row: _short(row["flops"] / 1e9),
    )
    if len(rows) <= FEW:
        yield _by_category(rows, size, unit)


def _by_blocks(rows: list[Row], title: str, cell: Callable[[Row], str]) -> Table:
    """A column for each number of blocks, so that the table stays narrow."""
    counts = sorted({row["num_blocks"] for row in rows})
    table = _table(title)
    table.add_column("number of blocks")
    table.add_column("offload")
    for count in counts:
        table.add_column(str(count), justify="right")
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((_name(row), _offload(row)), {})[row["num_blocks"]] = row
    for (name, offload), line in lines.items():
        cells = (cell(line[count]) if count in line else "" for count in counts)
        table.add_row(name, offload, *cells)
    return table


def _by_category(rows: list[Row], size: int, unit: str) -> Table:
    """A row for each of a few: what is alive at its peak, and below it the op."""
    table = _table(f"what is alive at the peak, {unit}, and the op")
    table.add_column("")
    for name in CATEGORIES:
        table.add_column(SHORT[name], justify="right")
    for row in rows:
        sizes = (_short(row["by_category"][category] / size) for category in CATEGORIES)
        table.add_row(f"{_name(row)}, {_blocks(row)}\n  {_op(row['at'])}", *sizes)
    return table


def _op(at: str) -> str:
    """The op without its namespace, cut to its column."""
    phase, _, op = at.partition(": ")
    name = op.partition("::")[2].removeprefix("_scaled_dot_product_")
    return f"{phase}: {name[:OP]}" if op else phase


def measured_table(rows: list[Row]) -> Iterator[Table]:
    """Predicted beside measured; empty where nothing was."""
    rows = _distinct(rows)
    size, unit = _unit(rows)
    table = _table(f"peak allocated of a step, {unit}, and its time without swaps, ms")
    table.add_column("")
    table.add_column("blocks")
    for name in ("predicted", "measured", "off by", "step", "sweep"):
        table.add_column(name, justify="right")
    for row in rows:
        predicted = _short(row["peak_allocated_bytes"] / size)
        table.add_row(_name(row), _blocks(row), predicted, *_measured(row, size))
    yield table


def _measured(row: Row, size: int) -> list[str]:
    """Peak, what the prediction is off by, and the times; nothing of what was not measured."""
    if "measured_allocated_bytes" not in row:
        return []
    measured = row["measured_allocated_bytes"]
    seconds = (row[f"seconds_per_{name}"] for name in ("step", "sweep"))
    off_by = f"{row['peak_allocated_bytes'] / measured - 1:+.1%}"
    return [_short(measured / size), off_by, *(_short(each * 1e3) for each in seconds)]


def not_measured(rows: list[Row]) -> Iterator[str]:
    """A sentence for each that was to be measured and could not be."""
    for row in _distinct(rows):
        if "not_measured" in row:
            yield f"{_name(row)}, {_blocks(row)} was not measured: {row['not_measured']}"


def _unit(rows: list[Row]) -> tuple[int, str]:
    """What sizes are told in: bytes of it, and its name."""
    largest = max((row["peak_allocated_bytes"] for row in rows), default=0)
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


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


def _table(title: str) -> Table:
    return Table(title=title, show_edge=False, title_justify="left", min_width=TITLE)


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
