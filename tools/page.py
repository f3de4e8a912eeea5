"""A page of HTML that holds everything it shows, and a file that appears whole or not at all."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path


def document(title: str, styles: Sequence[str], *, header: str, main: str, footer: str) -> str:
    """Put a page together.

    Args:
        title:   of the window, as plain text
        styles:  names of the CSS files beside this one, in order
        header:  HTML, as are the next two
        main:    between the others
        footer:  at the end
    Returns:
        the page, which refers to no other file.
    """
    folder = Path(__file__).parent
    css = "".join((folder / name).read_text(encoding="utf-8") for name in styles)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<header>{header}</header>
<main>
{main}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written; an older one is replaced.

    Args:
        path:  of the file; its folder is made
        text:  written as UTF-8
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
