"""A page of sections, written as Markdown or as HTML that refers to no other file."""

import base64
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

WIDTH = 100  # columns of Markdown
NUMBER = re.compile(r"(\*\*)?[\d+−–]")  # how a cell begins that stands at the right


@dataclass(frozen=True)
class Section:
    """A part of a page; its texts may hold `code` and **bold**."""

    title: str
    text: str = ""  # above the table and the picture
    table: Sequence[Sequence[str]] = ()  # its first line is the headings
    note: str = ""  # below the table, in small letters
    picture: Figure | None = None  # not in Markdown
    file: str = ""  # of the picture, from the page, for Markdown
    level: int = 2  # of the heading


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Write a page as Markdown, without the pictures that are in no file.

    Args:
        title:     above all
        sections:  in order; those that hold a picture alone, which is in no file, are left out
    Returns:
        text that ends with a new line.
    """
    parts = [f"# {title}"]
    for each in sections:
        if each.table or each.file or not each.picture:
            table = markdown_table(each.table) if each.table else ""
            heading = f"{'#' * each.level} {each.title}"
            picture = f"![{each.title}]({each.file})" if each.file else ""
            parts += filter(None, [heading, _filled(each.text), picture, table, _filled(each.note)])
    return "\n\n".join(parts) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Write a table; columns of numbers are aligned at the right.

    Args:
        table:  the headings, then the lines
    Returns:
        Markdown.
    """
    rule = ["---:" if number else "---" for number in _numbers(table)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def _numbers(table: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers."""
    return [all(NUMBER.match(cell) for cell in column) for column in zip(*table[1:], strict=True)]


def html(title: str, sections: Sequence[Section]) -> str:
    """Write a page as HTML.

    Args:
        title:     above all
        sections:  in order
    Returns:
        a document that needs no network and no script.
    """
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h{section.level}>{escape(section.title)}</h{section.level}>"]
    if section.text:
        parts.append(f"<p>{_inline(section.text)}</p>")
    if section.picture:
        parts.append(f'<img alt="{escape(section.title)}" src="{_data_uri(section.picture)}">')
    if section.table:
        parts.append(_table(section.table))
    if section.note:
        parts.append(f'<p class="note">{_inline(section.note)}</p>')
    return "\n".join(parts)


def _table(table: Sequence[Sequence[str]]) -> str:
    kinds = [' class="number"' if number else "" for number in _numbers(table)]
    lines = []
    for number, line in enumerate(table):
        tag = "td" if number else "th"
        cells = zip(line, kinds, strict=True)
        row = "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in cells)
        lines.append(f"<tr>{row}</tr>")
    return f'<div class="scroll"><table>\n{chr(10).join(lines)}\n</table></div>'


def _inline(text: str) -> str:
    parts = escape(text).split("`")
    parts[1::2] = [f"<code>{code}</code>" for code in parts[1::2]]
    for mark, tag in (("**", "b"), ("*", "i")):
        pattern = rf"{re.escape(mark)}(.+?){re.escape(mark)}"
        parts[::2] = [re.sub(pattern, rf"<{tag}>\1</{tag}>", words) for words in parts[::2]]
    return "".join(parts)


def _data_uri(picture: Figure) -> str:
    file = io.BytesIO()
    picture.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
