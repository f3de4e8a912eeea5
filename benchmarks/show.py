"""Print rows of benchmarks as tables: `python benchmarks/show.py FILE.jsonl ...`."""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, object]
Cell = Callable[[Row], str]
Columns = tuple[str, dict[str, Cell]]  # with a title

SIZES = ("B", "T", "dim", "num_heads", "hidden")  # of a layer
MIB = 2**20
NONE = "–"
LEFT = ("way", "competitor", "op", "at the peak")  # columns
WHOLE = (*LEFT[:3], "p20 to p80", "TFLOP/s", "launches")  # of which no cell is broken


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one case as one table; below it, what it ran on and by which command."""
    first = rows[0]
    kinds = {"op": _of_ops, "levels": _of_a_timeline, "method": _of_training}
    title, columns = next((kinds[name] for name in kinds if name in first), _of_a_layer)(rows)
    table = Table(title=f"{title}: {case_of(first)}", caption_justify="left")
    for name in columns:
        left, whole = name in LEFT, name in WHOLE
        table.add_column(name, justify="left" if left else "right", no_wrap=whole)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    commands = dict.fromkeys(row["command"] for row in rows if "command" in row)
    about = [_about(first), *filter(None, [" and ".join(commands)])]
    table.caption = escape("; printed by ".join(about))
    # a table that is cut at the width of a terminal, or of a pipe, cannot be read
    Console(width=max(Console().width, 124 if "method" in first else 110)).print(table)


def _of_a_timeline(rows: Sequence[Row]) -> Columns:
    return "a training step, op after op", _of_ways(rows) | {"at the peak": itemgetter("at")}


def _of_ways(rows: Sequence[Row]) -> dict[str, Cell]:
    peak = "peak_allocated_bytes"
    return {
        "way": way_of,
        "blocks": lambda row: str(row["num_blocks"]),
        "peak, MiB": _number_of(peak, MIB),
        "of eager": _ratio(rows, peak),
    }


def _of_training(rows: Sequence[Row]) -> Columns:
    columns = _of_ways(rows) | {"saved, MiB": _number_of("saved_bytes", MIB)}
    if any(row["step_ms"] is not None for row in rows):
        columns |= {
            "step, ms": _number_of("step_ms"),
            "p20 to p80": lambda row: f"{number(row['p20_ms'])} to {number(row['p80_ms'])}",
            "sweep, ms": _number_of("sweep_ms"),
            "of eager ": _ratio(rows, "sweep_ms"),
            "of matmul rate": _number_of("share_of_matmul_rate"),
        }
    return f"a training step, memory {rows[0]['memory']}", columns


def _of_a_layer(rows: Sequence[Row]) -> Columns:
    parts = ("impl", "recompute", "budget")

    def name(row: Row) -> str:
        return " ".join(str(row[part]) for part in parts if row[part] is not None)

    return "one AdaLN layer, forward plus backward", {
        "competitor": lambda row: name(row) + _otherwise(row, rows[0]),
        "kept, D per token": lambda row: f"{row['saved_units']:.2f}",
        "peak, MiB": lambda row: f"{row['peak_bytes'] / MIB:.1f}",
        "of eager": _ratio(rows, "peak_bytes"),
        "ms": lambda row: f"{row['median_ms']:.2f}",
        "p20 to p80": lambda row: f"{row['p20_ms']:.2f} to {row['p80_ms']:.2f}",
        "of eager ": _ratio(rows, "median_ms"),
        "TFLOP/s": lambda row: f"{row['achieved_tflops']:.3g}",
        "launches": _launches,
    }


def _of_ops(rows: Sequence[Row]) -> Columns:
    def name(row: Row) -> str:
        return f"{row['impl']} ({row['implementation']}){_otherwise(row, rows[0])}"

    def of_copies(row: Row) -> str:
        # rows of an older program have no copies of their size
        return f"{row.get('share_of_copy') or row['achieved_gbps'] / row['copy_gbps']:.2f}"

    return "ops", {
        "op": lambda row: f"{row['op']} {row['direction']}",
        "competitor": name,
        "ms": lambda row: f"{row['median_ms']:.4g}",
        "of eager": _ratio(rows, "median_ms"),
        "MB to move": lambda row: f"{row['bytes_moved'] / 1e6:.1f}",
        "GB/s": lambda row: f"{row['achieved_gbps']:.3g}",
        "of copies": of_copies,
        "allocated, MiB": lambda row: f"{row['allocated_bytes'] / MIB:.1f}",
    }


def _ratio(rows: Sequence[Row], figure: str) -> Cell:
    """A figure's ratio to eager's of the same op, where a table has both."""

    def same(row: Row) -> tuple:
        return row.get("op"), row.get("direction")

    eager = {
        same(row): row[figure]
        for row in reversed(rows)
        if row.get("impl") == "eager" or row.get("method") == "end_to_end"
    }

    def cell(row: Row) -> str:
        known = None not in (eager.get(same(row)), row[figure])
        return f"{row[figure] / eager[same(row)]:.2f}" if known else NONE

    return cell


def _launches(row: Row) -> str:
    """Of a forward and its backward; results from before they were counted have none."""
    if row.get("launches_forward") is None:
        return NONE
    return f"{row['launches_forward']} + {row['launches_backward']}"


def _otherwise(row: Row, usual: Row) -> str:
    """How a row was timed, where that is not as the caption says."""
    return "" if row["timing"] == usual["timing"] else f" ({row['timing']})"


def way_of(row: Row) -> str:
    """How a model is trained, but for the number of blocks, which has a column of its own."""
    parts = (
        row["method"].removeprefix("block_").replace("_", " "),
        row["recompute"],
        None if row["budget"] is None else f"budget {row['budget']:g}",
        "offload cpu" if row["offload"] == "cpu" else None,
        "optimizer in backward" if row.get("optimizer_in_backward") else None,
        "graph" if row.get("launch") == "graph" else None,
    )
    return " ".join(part for part in parts if part)


def _number_of(name: str, unit: int = 1) -> Cell:
    return lambda row: number(row[name], unit)


def number(value: float | None, unit: int = 1) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return NONE
    return f"{value / unit:.0f}" if value >= 1000 * unit else f"{value / unit:.3g}"


def case_of(row: Row) -> str:
    """What was run; rows of a table have one."""
    if "method" in row:
        dtype = "bfloat16 compute" if row["dtype"] == "autocast" else row["dtype"]
        return f"{row['family']} {row['preset']}, batch {row['batch']}, {dtype}, {row['device']}"
    sizes = [f"{name} = {row[name]}" for name in SIZES if name in row]
    sizes = sizes or [" x ".join(str(size) for size in row["shape"])]
    return f"{', '.join(sizes)}, {row['dtype']}"


def _about(row: Row) -> str:
    """What a table's figures come from."""
    driver = f", driver {row['driver']}" if row["driver"] else ""
    versions = f"torch {row['torch']}, triton {row['triton']}, commit {row['commit'] or 'unknown'}"
    if "method" in row and row.get("step_ms") is None:
        return f"predicted without running for {row['device']}{driver}; {versions}"
    copies = f"copies at {row['copy_gbps']:.4g} GB/s, "
    return (
        f"{row['device']}{driver}, {row['threads']} CPU threads, {versions}; "
        f"{copies}multiplies at {row['matmul_tflops']:.3g} TFLOP/s; "
        f"medians of {row['rounds']} rounds by {row['timing']}"
    )


def main(paths: Sequence[str]) -> None:
    """Print the rows of some files, a table for each case."""
    for path in paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for _, group in groupby(rows, case_of):
            show(list(group))


if __name__ == "__main__":
    main(sys.argv[1:])
