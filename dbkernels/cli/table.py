"""The tables of the command line."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

TITLE = 56  # columns of a terminal: the longest title has its line
Cells = Sequence[str]


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


def show(*parts: Table | Text | str) -> None:
    """Print tables, and text; what has several lines already is not broken into more."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part, markup=False, soft_wrap="\n" in str(part))
