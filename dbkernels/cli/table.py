"""What the command line prints: rows as JSON, or tables."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

TITLE = 56  # columns of a terminal: the longest title has its line
Cells = Sequence[str]
Row = dict[str, Any]  # a JSON object


def plain_console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Where the command line prints: a text of a user's, such as a path, stays as it is.

    Args:
        stderr:     whether it is stderr, else stdout
        soft_wrap:  whether lines are left whole
    """
    return Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def table(columns: Cells, rows: Iterable[Cells], *, names: int = 1, title: str = "") -> Table:
    """A table of strings.

    Args:
        columns:  their headings
        rows:     with as many cells as there are columns, or fewer
        names:    of the columns that hold names, which are the first; the others hold numbers
        title:    above it
    """
    width = TITLE if title else None
    made = Table(title=title or None, title_justify="left", show_edge=False, min_width=width)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < names else "right")
    for cells in rows:
        made.add_row(*cells)
    return made


def show(rows: Iterable[Row], screen: Iterable[Table | Text | str], *, as_json: bool) -> None:
    """Print rows as JSON, or else their screen.

    Args:
        rows:     each becomes a line as it comes
        screen:   tables and text; what has several lines already is not broken into more
        as_json:  whether the rows are printed
    """
    console = plain_console()
    for row in rows if as_json else ():
        print(json.dumps(row), flush=True)
    for part in () if as_json else screen:
        console.print(part, soft_wrap="\n" in str(part))
