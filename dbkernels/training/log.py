"""The log of a run: one JSON object a line, and the trackers that are asked for."""

import fcntl
import json
import os
import secrets
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from dbkernels.training.tracking.registry import TRACKERS, TrackerName, require_trackers
from dbkernels.training.tracking.tracker import Row, TrackedRun, Tracker
from dbkernels.whole_file import make_directory, write_whole

LOG = "log.jsonl"  # in the directory of a run


class RunLog:
    """Appends rows to `log.jsonl`; a resumed run drops the rows from its own step on.

    A run that starts anew drops none: what is there is kept under another name, which a warning
    tells.

    Args:
        directory:   of the run; made where it is missing
        first_step:  rows of this step of the run and later ones are dropped; 0 starts anew
        track:       trackers that show the rows too; one that fails on the way is left out from
                     there on, which a warning says
        config:      of the run, for trackers to show
    Raises:
        ValueError: a tracker is unknown or not installed, or another log of the directory is open,
                    in whatever process.
    """

    def __init__(
        self,
        directory: Path,
        *,
        first_step: int = 0,
        track: Sequence[TrackerName] = (),
        config: Mapping[str, object] | None = None,
    ):
        require_trackers(track)
        make_directory(directory)
        self._release = weakref.finalize(self, os.close, _claim(directory))
        # not before the claim: one who is refused leaves no file beside those of a run that goes on
        self._trackers = _open(track, directory, first_step, config or {})
        path = directory / LOG
        kept = [row for row in read_log(path) if row["step"] < first_step]
        if not first_step:
            _set_aside(path)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Row) -> None:
        """Log one step: its numbers by name, "step" and "block" among them."""
        self._file.write(json.dumps(row) + "\n")
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(row)
            except Exception as error:
                # a run of days does not end for want of a picture: its rows are in the file
                del self._trackers[name]
                message = f"{name} shows nothing from step {row['step']} on: {error}"
                warnings.warn(message, stacklevel=2)

    def close(self, *, finished: bool = True) -> None:
        """Write no more.

        Args:
            finished:  whether the run has come to its end, which trackers show
        """
        self._release()
        self._file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close(finished=finished)
            except Exception as error:
                warnings.warn(f"{name} lacks the last rows: {error}", stacklevel=2)


def _open(
    names: Sequence[TrackerName], directory: Path, first_step: int, config: Mapping[str, object]
) -> dict[TrackerName, Tracker]:
    if not names:
        return {}
    run, trackers = TrackedRun(directory, _id(directory, first_step), first_step, config), {}
    for name in names:
        try:
            trackers[name] = TRACKERS[name].make(run)
        except Exception as error:
            for opened in trackers.values():
                opened.close(finished=False)
            raise ValueError(
                f"{name} must be able to show the run, got {str(error).strip()}"
            ) from error
    return trackers


def _id(directory: Path, first_step: int) -> str:
    """By which trackers know a run again that goes on; made when it starts anew."""
    path = directory / "tracked_as.txt"
    if first_step and path.exists():
        return path.read_text()
    made = secrets.token_hex(4)
    write_whole(path, made)
    return made


@contextmanager
def one_writer(directory: Path) -> Iterator[None]:
    """Hold the directory of a run, as a run that goes on does.

    Raises:
        ValueError: another holds it, in whatever process.
    """
    descriptor = _claim(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _claim(directory: Path) -> int:
    """A descriptor that holds a directory against others until it is closed, or its owner dies."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{directory} must have one writer, got another that goes on") from None
    except OSError:
        # file systems without locks hold runs as well
        pass
    return descriptor


def _set_aside(path: Path) -> None:
    """Keep a log that is not empty under a name that is free."""
    if not path.exists() or not path.stat().st_size:
        return
    names = (path.with_name(f"log-{number}.jsonl") for number in count(1))
    aside = next(each for each in names if not os.path.lexists(each))
    os.rename(path, aside)
    message = f"{path} is that of a run without a checkpoint: it is kept as {aside.name}"
    warnings.warn(message, stacklevel=3)


def read_log(path: Path) -> list[dict[str, float | int]]:
    """All whole rows of a log; none where there is no file.

    A last row that was cut short is left out. So are rows that are damaged: a warning counts them.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = list(filter(None, map(_row, lines)))
    if damaged := len(lines) - len(rows):
        warnings.warn(f"{path} has {damaged} damaged rows, which are left out", stacklevel=2)
    return rows


def _row(line: bytes) -> dict[str, float | int] | None:
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
