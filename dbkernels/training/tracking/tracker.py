"""What a tracker is told of a run, and what it is asked to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PROJECT = "dbkernels"  # that runs are shown under

Row = Mapping[str, float | int]


@dataclass(frozen=True)
class TrackedRun:
    """A run, as a tracker knows it."""

    directory: Path
    id: str  # the same when the run goes on
    first_step: int  # of the rows to come; 0 in a run that starts anew
    config: Mapping[str, object]  # plain values, in mappings and sequences

    @property
    def name(self) -> str:
        """To show; runs of one name in several folders are told from each other."""
        return f"{self.directory.absolute().name}-{self.id}"


class Tracker(Protocol):
    """Shows the rows of a run; opened by the run."""

    def write(self, row: Row) -> None:
        """Show a row: its numbers by name, "step" and "block" among them."""

    def close(self, *, finished: bool) -> None:
        """Show no more; `finished` where the run has come to its end."""


def scalars(row: Row) -> dict[str, float | int]:
    """The numbers of a row, named for their block: each block has a curve of its own."""
    names = sorted(row.keys() - {"step", "block"})
    return {f"{name}/block{row['block']}": row[name] for name in names}
