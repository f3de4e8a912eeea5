"""The tables of the command line."""

from rich.table import Table


def table(*columns: str, names: int = 1, title: str | None = None, width: int = 0) -> Table:
    """A table without rows.

    Args:
        columns:  their headings
        names:    of the columns that hold names, which are the first; the others hold numbers
        title:    above it
        width:    columns of the terminal that it has at least
    """
    made = Table(title=title, title_justify="left", show_edge=False, min_width=width)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < names else "right")
    return made
