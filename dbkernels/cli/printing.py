"""Text of a model on stdout, while it comes."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # of a terminal, but for lines and tabs


@contextmanager
def printing() -> Iterator[Callable[[str], None]]:
    """Print a text in pieces, each seen at once, and end its line even where it is cut short."""
    encoding, screen = sys.stdout.encoding or "utf-8", sys.stdout.isatty()

    def write(text: str) -> None:
        if screen:
            text = CONTROLS.sub("\ufffd", text.replace("\r", ""))
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    try:
        try:
            yield write
        finally:
            write("\n")
    except BrokenPipeError:
        # whoever read it has enough; what Python still flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
