"""The log of a run: one JSON object a line, and TensorBoard where it is asked for."""

import fcntl
import json
import os
import warnings
import weakref
from itertools import count
from pathlib import Path

from dbkernels.whole_file import make_directory, write_whole


class RunLog:
    """Appends rows to `log.jsonl`; a resumed run drops the rows from its own step on.

    A run that starts anew drops none: what is there is kept under another name, which a warning
    tells.

    Args:
        directory:    of the run; made where it is missing
        first_step:   rows of this step of the run and later ones are dropped; 0 starts anew
        tensorboard:  whether to write event files to directory/tensorboard too
    Raises:
        ValueError: TensorBoard is asked for and not installed, or another log of the directory is
                    open, in whatever process.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, tensorboard: bool = False):
        writer = _tensorboard_writer() if tensorboard else None
        make_directory(directory)
        self._release = weakref.finalize(self, os.close, _claim(directory))
        path = directory / "log.jsonl"
        kept = [row for row in read_log(path) if row["step"] < first_step]
        if not first_step:
            _set_aside(path)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        # not before the claim: one who is refused leaves no file beside those of a run that goes on
        self._writer = writer and writer(
            str(directory / "tensorboard"), purge_step=first_step or None
        )

    def write(self, row: dict[str, float | int]) -> None:
        """Log one step: its numbers by name, "step" and "block" among them."""
        self._file.write(json.dumps(row) + "\n")
        if self._writer:
            for name in sorted(row.keys() - {"step", "block"}):
                self._writer.add_scalar(f"{name}/block{row['block']}", row[name], row["step"])

    def close(self) -> None:
        self._release()
        self._file.close()
        if self._writer:
            self._writer.close()


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


def _tensorboard_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard must be installed for its log (pip install dbkernels[tensorboard]), "
            "got an environment without it"
        ) from None
    return SummaryWriter
