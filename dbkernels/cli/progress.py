"""What a long command has done so far, on stderr: a bar on a terminal, and lines elsewhere."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from dbkernels.cli.table import plain_console

SECONDS = 30.0  # from one line to the next, at most, while steps are done
SHARE = 0.1  # of all steps, after which a line comes sooner
SOON = 1.0  # seconds, and not before


class ProgressBar:
    """Steps that are done of so many, with what is to be said of the last one.

    The bar, or the first line, appears with the first step, so that a refusal before it is alone.
    Off a terminal, as in a pipe or a file, lines come with the first step and the last, between
    them for each SHARE of the steps, and every SECONDS where that takes long.

    Args:
        told:   what is done, in a word
        total:  how many steps there are; may be set later
        unit:   what a step is called, in the plural
    """

    def __init__(self, told: str, total: int, unit: str = "steps"):
        self.told, self.total, self.unit = told, total, unit
        # whole lines: a message that is cut at the terminal's width cannot be searched for
        self._console = plain_console(stderr=True, soft_wrap=True)
        columns = *Progress.get_default_columns()[:-1], TimeRemainingColumn()
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            # what goes to a file meanwhile stays there
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(told, total=total, text="")
        self._first: tuple[float, int] | None = None  # when it was done, and how many were by then
        self._last = 0.0, 0  # when a line came, and how many were done by then

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop() if self._bar.live.is_started else None

    def step(self, done: int, text: str = "") -> None:
        """Show how many steps are done.

        Args:
            done:  of the total
            text:  about the last of them; without it no line comes off a terminal
        """
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, total=self.total, completed=done, text=text)
            return
        now = time.monotonic()
        self._first = self._first or (now, done)
        if text and self._due(now, done):
            self._last = now, done
            count = f"{done} of {self.total} {self.unit}"
            self.say(f"{self.told} {count}{self._left(now, done)}: {text}")

    def _due(self, now: float, done: int) -> bool:
        then, before = self._last
        if not before or done >= self.total or now - then >= SECONDS:
            return True
        return done - before >= SHARE * self.total and now - then >= SOON

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        then, before = self._first
        if not before < done < self.total:
            return ""
        left = (now - then) / (done - before) * (self.total - done)
        return f", {timedelta(seconds=round(left))} left"

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text)

    def warn(
        self,
        message: Warning | str,
        category: type[Warning] = UserWarning,
        filename: str = "",
        lineno: int = 0,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Say a warning, without the line of code that gave it; stands in for `showwarning`."""
        self._console.print(f"warning: {message}", style="yellow")
