"""A table of the report of benchmarks: made once, written as HTML or as Markdown."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from typing import Literal

from report_text import NOTHING

Best = Literal["min", "max"] | None


@dataclass(frozen=True)
class Cell:
    """One figure."""

    text: str = NOTHING
    note: str = ""  # small, below it; in Markdown only beside the name of a line
    value: float | None = None  # that decides which is best
    predicted: bool = False
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A heading, and which of its figures is set in bold."""

    title: str
    best: Best = None
    left: bool = False  # aligned; figures are at the right


@dataclass(frozen=True)
class Table:
    """Lines in groups, of which each has its best figures; the first cell names its line."""

    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]  # a title, and lines
    heading: str = ""  # over the titles of groups, which are a column in Markdown

    def marked(self) -> "Table":
        """Set the best figures of each group in bold, where it has more than one to choose from."""
        groups = ((title, tuple(_marked(lines, self.columns))) for title, lines in self.groups)
        return replace(self, groups=tuple(groups))


def _marked(
    lines: Sequence[tuple[Cell, ...]], columns: Sequence[Column]
) -> Iterable[tuple[Cell, ...]]:
    goals = []
    for column, cells in zip(columns, zip(*lines, strict=True), strict=True):
        values = [cell.value for cell in cells if cell.value is not None]
        pick = {"min": min, "max": max, None: None}[column.best]
        goals.append(pick(values) if pick and len(set(values)) > 1 else None)
    for line in lines:
        yield tuple(
            replace(cell, best=goal is not None and cell.value == goal)
            for cell, goal in zip(line, goals, strict=True)
        )


def html_table(table: Table) -> str:
    """Write a table as an element that scrolls sideways where it is too wide.

    Args:
        table:  to write
    Returns:
        HTML.
    """
    heads = "".join(
        f'<th scope="col"{"" if column.left else " class=number"}>{inline_html(column.title)}</th>'
        for column in table.columns
    )
    body = ""
    for title, lines in table.groups:
        rows = "".join(f"<tr>{_html_line(line, table.columns)}</tr>\n" for line in lines)
        group = f'<tr><th scope="rowgroup" colspan="{len(table.columns)}">{escape(title)}</th></tr>'
        body += f"<tbody>{group if title else ''}\n{rows}</tbody>"
    return (
        '<div class="scroll" tabindex="0"><table class="figures">'
        f"<thead><tr>{heads}</tr></thead>{body}</table></div>"
    )


def _html_line(line: Sequence[Cell], columns: Sequence[Column]) -> str:
    name, *rest = line
    cells = f'<th scope="row">{inline_html(name.text)}{_small(name)}</th>'
    for cell, column in zip(rest, columns[1:], strict=True):
        text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
        cells += f"<td{'' if column.left else ' class=number'}>{text}{_small(cell)}</td>"
    return cells


def _small(cell: Cell) -> str:
    notes = ", ".join(filter(None, ("predicted" if cell.predicted else "", cell.note)))
    return f"<small>{escape(notes)}</small>" if notes else ""


def inline_html(text: str) -> str:
    """Write a line of Markdown that has nothing but `code`.

    Args:
        text:  of the line
    Returns:
        HTML, escaped.
    """
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def markdown_table(table: Table) -> str:
    """Write a table as Markdown, without columns that say nothing.

    Args:
        table:  to write
    Returns:
        lines without a last end of line.
    """
    columns = [Column(table.heading, left=True)] if table.heading else []
    columns += table.columns
    lines = [
        [_markdown(column.title) for column in columns],
        ["---" if column.left else "---:" for column in columns],
    ]
    for title, group in table.groups:
        first = [_markdown(title)] if table.heading else []
        lines += [[*first, _named(line[0]), *map(_markdown_cell, line[1:])] for line in group]
    told = [any(cell != NOTHING for cell in column) for column in zip(*lines[2:], strict=True)]
    lines = [list(compress(line, told)) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(cell: Cell) -> str:
    return f"{_markdown(cell.text)} ({_markdown(cell.note)})" if cell.note else _markdown(cell.text)


def _markdown_cell(cell: Cell) -> str:
    text = _markdown(cell.text)
    text = f"**{text}**" if cell.best else text
    return f"{text} (predicted)" if cell.predicted else text


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
