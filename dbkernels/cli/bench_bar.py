"""The progress bar of `python -m dbkernels bench`: what runs now, what is done, the time left."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text


class Pace:
    """How long things take, by how long those that are done were thought to take, and took.

    Args:
        seconds:  that each is thought to take, in the order in which they run
    """

    def __init__(self, seconds: Sequence[float]):
        self._expected, self._taken = list(seconds), 0.0
        self._done, self._began = 0, 0.0

    def begin(self, now: float) -> None:
        """The next one begins."""
        self._began = now

    def end(self, now: float) -> float:
        """It is done; the seconds that it took."""
        took = now - self._began
        self._done, self._taken = self._done + 1, self._taken + took
        return took

    def left(self, now: float) -> float:
        """Seconds until all are done, while one runs."""
        known = sum(self._expected[: self._done])
        pace = self._taken / known if known else 1.0
        current, *others = (pace * seconds for seconds in self._expected[self._done :])
        # what takes longer than was thought has no time left, and the others have all of theirs
        return max(current - (now - self._began), 0.0) + sum(others)


class Bar:
    """A bar on a terminal, and nothing elsewhere; a context.

    Args:
        seconds:  as those of `Pace`
        done:     how many of all were done before
        console:  where it is shown
    """

    def __init__(self, seconds: Sequence[float], *, done: int, console: Console):
        self._pace = Pace(seconds)
        left = _TimeLeft(self._pace)
        columns = (BarColumn(), MofNCompleteColumn(), left, TextColumn("{task.description}"))
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("", total=done + len(seconds), completed=done)

    def __enter__(self) -> "Bar":
        self._progress.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.__exit__(*exception)

    def begin(self, name: str) -> None:
        """Show what runs now."""
        self._pace.begin(time.monotonic())
        self._progress.update(self._task, description=name)

    def end(self) -> float:
        """It is done; the seconds that it took."""
        self._progress.advance(self._task)
        return self._pace.end(time.monotonic())


class _TimeLeft(ProgressColumn):
    def __init__(self, pace: Pace):
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        if task.finished or not task.description:
            return Text()
        minutes, seconds = divmod(round(self._pace.left(time.monotonic())), 60)
        return Text(f"about {minutes}:{seconds:02} left")
