"""What every benchmark here is as a program: its options, and its rows as a table, lines or a file.

A row is one competitor in one case, a JSON object on a line of its own. A file of rows is only ever
added to: what it has for the same case, device and commit is not measured again.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import machine
import torch
import tyro
from show import Row, object_of, parsed, show

from dbkernels.cli.device import pick_device
from dbkernels.memory.allocator import Target, target_named, target_of

Kind = TypeVar("Kind", bound="Program")


@dataclass(frozen=True)
class Program:
    """Options that every benchmark has."""

    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int | None = None  # of the CPU
    json: bool = False  # one object to a line instead of a table
    out: Path | None = None  # file that rows are added to; what it has is not measured again

    @property
    def on(self) -> torch.device:
        """The device that runs."""
        return pick_device(self.device)

    def require_positive(self, *names: str, least: int = 1) -> None:
        """Raise ValueError where an option is given and below the least that it may be."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def require_known(self, **known: Iterable[object]) -> None:
        """Raise ValueError where an option, or one of its values, is not among those known."""
        for name, values in known.items():
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if each not in (*values, None):
                    raise ValueError(f"{name} must be of {', '.join(values)}, got {each}")

    def require_share(self, name: str) -> None:
        """Raise ValueError where a budget is not a share."""
        value = getattr(self, name)
        for each in value if isinstance(value, tuple) else (value,):
            if not 0 <= each <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {each}")

    def gpu(self, target: str) -> Target:
        """The GPU that is predicted: by its name, or for auto the one that is here, or an H100."""
        if target == "auto" and self.on.type == "cuda":
            return target_of(self.on)
        return target_named("h100" if target == "auto" else target)

    def wanted(self) -> list[Row]:
        """What each row that is asked for is known by, but for its commit."""
        raise NotImplementedError

    def tables(self, known: "Known") -> Iterator[Iterable[Row]]:
        """The rows that are not known yet, in tables of one case each."""
        raise NotImplementedError


class Known:
    """The finished rows of a file at one commit.

    Args:
        path:    of the file, which may be missing; None knows no row
        commit:  of the rows that count
    """

    def __init__(self, path: Path | None, commit: str | None):
        found = read(path) if path and path.exists() else []
        self._rows = [row for row in found if row.get("commit") == commit and _is_finished(row)]

    def lacks(self, key: Mapping[str, object]) -> bool:
        """Whether no row is the one that is known by these names and values."""
        short = json.loads(json.dumps(rounded(key)))
        return not any(short.items() <= row.items() for row in self._rows)


def _is_finished(row: Row) -> bool:
    """Whether a row has its times, or will have none; one of training may come early without."""
    return row.get("memory") != "measured" or row["step_ms"] is not None


def read(path: Path) -> list[Row]:
    """The rows of a file, but for a last line that was cut off.

    Raises:
        ValueError: another line is no row; names the file and the line.
    """
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return list(parsed(whole, object_of, path))


def rounded(row: Mapping[str, object]) -> Row:
    """A row with six digits of each number."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def emit(rows: Iterable[Row], options: Program) -> None:
    """Write the rows of one case to a file and as lines, as they come; or else as a table."""
    found = []
    for row in rows:
        found.append(row)
        line = json.dumps(rounded(row))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            _end_at_a_line(options.out)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if options.json:
            print(line, flush=True)
    found = list(filter(_is_finished, found))
    if found and not options.json:
        show(found)


def _end_at_a_line(path: Path) -> None:
    """Cut off a last line that has no end."""
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def called() -> str:
    """What was typed, as it can be repeated in the checkout to print a table."""
    words, left_out = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif word != "--json" and not word.startswith("--out="):
            left_out.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *left_out])


def main(kind: type[Kind]) -> None:
    """Run a benchmark from the command line; ends with 2 and a sentence where that is wrong."""
    options = tyro.cli(kind)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        known = Known(options.out, machine.commit())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for rows in options.tables(known):
        emit(rows, options)
