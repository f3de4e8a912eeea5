"""Print rows of benchmarks as tables: `python benchmarks/show.py FILE.jsonl ...`."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from show_training import timeline_table, training_about, training_case, training_table

Row = dict[str, object]

SHOWN = ("B", "T", "dim", "num_heads", "hidden")  # of a case


def emit(rows: Iterable[Row], *, as_json: bool) -> None:
    """Print the rows of one case: as they come, one JSON object a line; or at their end a table."""
    if not as_json:
        found = list(rows)
        if found:
            show(found)
        return
    for row in rows:
        short = {name: _six_digits(value) for name, value in row.items()}
        print(json.dumps(short), flush=True)


def show(rows: list[Row]) -> None:
    """Print the rows of one case as one table; below it, what it ran on and by which command."""
    trained = "method" in rows[0]
    tables = {"op": _ops_table, "levels": timeline_table, "method": training_table}
    table = next((tables[name] for name in tables if name in rows[0]), _layer_table)(rows)
    table.title = f"{table.title}: {_case(rows[0])}"
    commands = dict.fromkeys(row["command"] for row in rows if "command" in row)
    about = training_about(rows[0]) if trained else _about(rows[0])
    table.caption = escape("; printed by ".join(filter(None, [about, " and ".join(commands)])))
    # a table that is cut at the width of a terminal, or of a pipe, cannot be read
    Console(width=max(Console().width, 124 if trained else 110)).print(table)


def _layer_table(rows: list[Row]) -> Table:
    table = Table(title="one AdaLN layer, forward plus backward", caption_justify="left")
    table.add_column("competitor", no_wrap=True)
    for column in ("kept, D per token", "peak, MiB", "of eager", "ms", "p20 to p80", "of eager"):
        table.add_column(column, justify="right", no_wrap="p20" in column)
    for column in ("TFLOP/s", "launches"):
        table.add_column(column, justify="right", no_wrap=True)
    eager = next((row for row in rows if row["impl"] == "eager"), None)
    for row in rows:
        table.add_row(
            " ".join(str(part) for part in _names(row)) + _otherwise(row, rows[0]),
            f"{row['saved_units']:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            _ratio(row, eager, "peak_bytes"),
            f"{row['median_ms']:.2f}",
            f"{row['p20_ms']:.2f} to {row['p80_ms']:.2f}",
            _ratio(row, eager, "median_ms"),
            f"{row['achieved_tflops']:.3g}",
            _launches(row),
        )
    return table


def _launches(row: Row) -> str:
    """Of a forward and its backward; results from before they were counted have none."""
    if row.get("launches_forward") is None:
        return "–"
    return f"{row['launches_forward']} + {row['launches_backward']}"


def _ops_table(rows: list[Row]) -> Table:
    table = Table(title="ops", caption_justify="left")
    for column in ("op", "competitor"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "of eager", "MB to move", "GB/s", "of copies", "allocated, MiB"):
        table.add_column(column, justify="right")
    for (op, direction), same in groupby(rows, lambda row: (row["op"], row["direction"])):
        group = list(same)
        eager = next((row for row in group if row["impl"] == "eager"), None)
        for row in group:
            table.add_row(
                f"{op} {direction}" if row is group[0] else "",
                f"{row['impl']} ({row['implementation']}){_otherwise(row, rows[0])}",
                f"{row['median_ms']:.4g}",
                _ratio(row, eager, "median_ms"),
                f"{row['bytes_moved'] / 1e6:.1f}",
                f"{row['achieved_gbps']:.3g}",
                f"{row.get('share_of_copy') or row['achieved_gbps'] / row['copy_gbps']:.2f}",
                f"{row['allocated_bytes'] / 2**20:.1f}",
                end_section=row is group[-1],
            )
    return table


def _names(row: Row) -> Iterator[object]:
    return (row[name] for name in ("impl", "recompute", "budget") if row[name] is not None)


def _otherwise(row: Row, usual: Row) -> str:
    """How a row was timed, where that is not as the caption says."""
    return "" if row["timing"] == usual["timing"] else f" ({row['timing']})"


def _six_digits(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _ratio(row: Row, eager: Row | None, name: str) -> str:
    return f"{row[name] / eager[name]:.2f}" if eager else "–"


def _case(row: Row) -> str:
    if "method" in row:
        return training_case(row)
    sizes = [f"{name} = {row[name]}" for name in SHOWN if name in row]
    sizes = sizes or [" x ".join(str(size) for size in row["shape"])]
    return f"{', '.join(sizes)}, {row['dtype']}"


def _about(row: Row) -> str:
    driver = f", driver {row['driver']}" if row["driver"] else ""
    return (
        f"{row['device']}{driver}, {row['threads']} CPU threads, torch {row['torch']}, "
        f"triton {row['triton']}, commit {row['commit'] or 'unknown'}; "
        f"copies at {row['copy_gbps']:.4g} GB/s, "
        f"multiplies at {row['matmul_tflops']:.3g} TFLOP/s; "
        f"medians of {row['rounds']} rounds by {row['timing']}"
    )


def main(paths: list[str]) -> None:
    for path in paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for _, group in groupby(rows, _case):
            show(list(group))


if __name__ == "__main__":
    main(sys.argv[1:])
