"""Errors of a command, each said in one sentence, and warnings, each in one line."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from dbkernels.cli.table import plain_console
from dbkernels.memory.measure import out_of_memory


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What is run within says its errors in a sentence, and ends the program with 1.

    These are a caller's mistakes, files that the system refuses, a loss that is no number, and
    memory that is not there. All else is a fault of the program and keeps its traceback.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            yield
    except OSError as error:
        _exit(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except (ValueError, FloatingPointError) as error:
        _exit(str(error))
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        _exit(reason)
    except KeyboardInterrupt:
        sys.exit(130)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say a warning in a line, without the code that gave it."""
    plain_console(stderr=True, soft_wrap=True).print(f"warning: {message}", style="yellow")


def _exit(text: str) -> NoReturn:
    # whole lines: a message that is cut at the terminal's width cannot be searched for
    plain_console(stderr=True, soft_wrap=True).print(f"error: {text}", style="red")
    sys.exit(1)
