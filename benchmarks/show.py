"""Print rows of benchmarks as tables: `python benchmarks/show.py FILE.jsonl ...`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# the report's files stand beside each other and are no package
sys.path.append(str(Path(__file__).parents[1] / "tools"))
from report_rows import SUITES, Row, read, tables
from report_tables import about, case_text, table_of

WHOLE = ("op", "way", "model", "p20 to p80", "launches")  # columns of which no cell is broken


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one case as one table; below it, what it ran on and by which command."""
    first = rows[0]
    suite = first.get("suite") or ("ops" if "op" in first else "layer")
    rows = [{"suite": suite} | row for row in rows]
    headings, *lines = table_of(rows)
    title = f"{suite}: {case_text(rows[0])}, {first['device']}" if suite != "demo" else suite
    table = Table(title=title, caption=escape(about(rows)), caption_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in WHOLE)
    for line in lines:
        table.add_row(*(re.sub(r"\*\*(.+?)\*\*", r"[b]\1[/b]", escape(cell)) for cell in line))
    # a table that is cut at the width of a terminal, or of a pipe, cannot be read
    Console(width=max(Console().width, 240)).print(table)


def way_of(row: Row) -> str:
    """How a model is trained, in few words and without the number of blocks."""
    parts = (
        row["method"].removeprefix("block_").replace("_", " "),
        row["recompute"],
        None if row["budget"] is None else f"budget {row['budget']:g}",
        "offload cpu" if row["offload"] == "cpu" else None,
        "optimizer in backward" if row.get("optimizer_in_backward") else None,
        "graph" if row.get("launch") == "graph" else None,
    )
    return " ".join(part for part in parts if part)


def main(paths: Sequence[str]) -> None:
    """Print the rows of some files, a table for each case."""
    rows = read([Path(path) for path in paths])
    for suite in SUITES:
        for table in tables(rows, suite):
            show(table)


if __name__ == "__main__":
    main(sys.argv[1:])
