"""Print rows of benchmarks as tables: `python benchmarks/show.py FILE.jsonl ...`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

# the report's files stand beside each other and are no package
sys.path.append(str(Path(__file__).parents[1] / "tools"))
from report_claims import verdicts
from report_names import about, case_text, cut_text
from report_rows import SUITES, Row, object_of, parsed, read, suite_of, tables
from report_study import study_table
from report_tables import table_of

from dbkernels.cli.sentence import in_a_sentence
from dbkernels.cli.table import plain_console

__all__ = ["Row", "cut_text", "object_of", "parsed", "read", "rich_table", "show", "show_study"]
WHOLE = ("op", "way", "model", "p20 to p80", "launches")  # columns of which no cell is broken


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one case as one table; below it, what it ran on and by which command."""
    rows = [{"suite": suite_of(row)} | row for row in rows]
    suite, device = rows[0]["suite"], rows[0]["device"]
    title = suite if suite == "demo" else f"{suite}: {case_text(rows[0])}, {device}"
    _print(table_of(rows), title, about(rows))


def show_study(rows: Sequence[Row]) -> None:
    """Print the rows of a study: a table of each family and data, and what was expected."""
    for table in tables(rows, "study"):
        row = table[0]
        case = f"{row['study']}, {row['scale']}: {row['family']}, {row['data']}, {row['device']}"
        _print(study_table(table), case, about(table))
        if claims := verdicts(table):
            _print(claims, "as expected?", "")


def _print(lines: Sequence[Sequence[str]], title: str, caption: str) -> None:
    # a table that is cut at the width of a terminal, or of a pipe, cannot be read
    console = plain_console()
    console.width = max(console.width, 240)
    console.print(rich_table(lines, title, caption))


def rich_table(lines: Sequence[Sequence[str]], title: str, caption: str) -> Table:
    """A table of the report for a terminal; its first line is the headings."""
    headings, *rest = lines
    table = Table(title=Text(title), caption=Text(caption), caption_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in WHOLE)
    for line in rest:
        table.add_row(*map(_bold, line))
    return table


def _bold(cell: str) -> Text:
    """A cell of which what is between two pairs of stars is bold."""
    parts = re.split(r"\*\*(.+?)\*\*", cell)
    return Text.assemble(*((part, "bold" if i % 2 else "") for i, part in enumerate(parts)))


def main(paths: Positional[tuple[Path, ...]], /) -> None:
    """Print the rows of benchmarks, a table for each case.

    Args:
        paths:  files of JSON lines, or folders of such
    """
    if not paths:
        raise ValueError("show needs a file of rows, got none")
    rows = read(paths)
    for suite in SUITES:
        if suite == "study":
            show_study(rows)
            continue
        for table in tables(rows, suite):
            show(table)


if __name__ == "__main__":
    with in_a_sentence():
        tyro.cli(main)
