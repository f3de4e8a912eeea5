"""How a checkpoint is written: whole or not at all, by one process or by several together."""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch.distributed import ProcessGroup

from dbkernels import whole_file
from dbkernels.settings import check_number
from dbkernels.training.checkpoint.manifest import (
    STATE_FILE,
    Files,
    check_state,
    file_name,
    manifest_bytes,
)
from dbkernels.training.checkpoint.part import Part, part_of, together
from dbkernels.training.checkpoint.root import (
    check_names,
    discard,
    hidden,
    newest_first,
    tidy,
    told,
)
from dbkernels.training.checkpoint.shard import Parts
from dbkernels.training.checkpoint.writers import Alone, Writers, writers_of
from dbkernels.training.tensor_file import Read, pieces, write_tensors

_SAVING = threading.Lock()


@dataclass(frozen=True)
class Request:
    """What to save beside tensors, and where: the arguments of `save`."""

    root: Path
    step: int
    state: dict
    keep: int
    finite: Collection[str]

    def check(self) -> None:
        """Refuse what could not be read back as it is."""
        check_number("keep", self.keep, 1)
        if not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"step must be an integer of at least 0, got {self.step!r}")
        if not isinstance(self.state, dict):
            raise ValueError(f"state must be a dict, got {type(self.state).__name__}")
        check_state(self.state, "state")


def save(
    root: Path,
    step: int,
    tensors: Parts,
    state: dict,
    *,
    keep: int = 2,
    read: Read = pieces,
    finite: Collection[str] = (),
    group: ProcessGroup | None = None,
) -> Path:
    """Write root/step-<step> so that a crash at any moment leaves either the old or the new.

    Args:
        root:     directory of all checkpoints of one run; made if missing
        step:     optimizer steps done; a checkpoint of the same step is replaced
        tensors:  group -> name -> dense tensor of DTYPES, of any device and strides; or of several
                  processes a `Shard`. A tensor is saved by the first of them, which must have it
        state:    what JSON has, with finite numbers and string keys; a tuple returns as a list. Of
                  several processes, that of the first
        keep:     checkpoints left in root: this one and the newest others
        read:     gives a tensor's bytes, in pieces
        finite:   groups in which every number must be finite
        group:    processes that save together, on a file system that all see; each calls this. None
                  is this process alone
    Returns:
        The directory of the checkpoint.
    Raises:
        ValueError: an argument that could not be read back as it is, or something that is no
                    checkpoint has the name of one, or what the processes hold makes no whole.
        FloatingPointError: a number that must be finite is not; earlier checkpoints are untouched.
        OSError: the disk refused; earlier checkpoints are untouched.
        RuntimeError: another process died; earlier checkpoints are untouched.
        What fails in one of several processes is raised in all of them.
    """
    writers = writers_of(group)
    request = Request(root, step, state, keep, finite)
    return save_part(request, lambda: part_of(tensors, writers.rank, writers.count), read, writers)


def save_part(
    request: Request, take: Callable[[], Part], read: Read, writers: Alone | Writers
) -> Path:
    """Save what a process writes, with the others.

    Args:
        request:  the same on each rank, but for its state
        take:     gives what this one writes
        read:     gives a tensor's bytes, in pieces
        writers:  that save together
    """
    with _SAVING:
        return _Save(request, read, writers).run(take)


class _Opened(NamedTuple):
    """What a rank has to say before it writes."""

    step: int
    directory: str  # that the first rank has made
    part: Part  # without its tensors


class _Save:
    """One save, on one rank."""

    def __init__(self, request: Request, read: Read, writers: Alone | Writers):
        self._request, self._read, self._writers = request, read, writers
        self._root = request.root
        self._first, self._begun = not writers.rank, False

    def run(self, take: Callable[[], Part]) -> Path:
        try:
            opened = self._writers.do(lambda: self._open(take))
            written = self._writers.do(lambda: self._write(opened))
            self._writers.do(lambda: self._publish(written))
        except BaseException:
            if self._begun:
                # of a rank that died without a word, another may still write: the next save tidies
                with suppress(OSError):
                    tidy(self._root)
            raise
        return self._final

    def _open(self, take: Callable[[], Part]) -> _Opened:
        self._request.check()
        self._part = take()
        self._final = self._root / f"step-{self._request.step:08d}"
        temporary = hidden(self._final)
        if self._first:
            whole_file.make_directory(self._root)
            check_names(self._root)
            tidy(self._root)
            self._begun = True
            with _named(self._final):
                temporary.mkdir()
        about = Part({}, self._part.whole, self._part.pieces)
        return _Opened(self._request.step, temporary.name, about)

    def _write(self, opened: list[_Opened]) -> Files:
        self._temporary = self._root / opened[0].directory
        if self._first:
            steps = [each.step for each in opened]
            if len(set(steps)) > 1:
                raise ValueError(f"step must be the same on each rank, got {steps}")
            self._pieces = together([each.part for each in opened])
        files: Files = {}
        with _named(self._final):
            for group, named in self._part.tensors.items():
                path = self._temporary / file_name(group, self._writers.rank, self._writers.count)
                finite = group in self._request.finite
                with whole_file.new_file(path) as file:
                    size, digest = write_tensors(file, named, read=self._read, finite=finite)
                whole_file.make_durable(path)
                files[path.name] = {"bytes": size, "sha256": digest}
        return files

    def _publish(self, written: list[Files]) -> None:
        if not self._first:
            return
        final, temporary, request = self._final, self._temporary, self._request
        files = {name: entry for each in written for name, entry in each.items()}
        ranks = self._writers.count
        manifest = manifest_bytes(request.step, request.state, files, ranks, self._pieces)
        with _named(final):
            with whole_file.new_file(temporary / STATE_FILE) as file:
                file.write(manifest)
            whole_file.make_durable(temporary / STATE_FILE)
            whole_file.make_durable(temporary)
            if final.exists():
                os.rename(final, final.with_suffix(".replaced"))
            os.rename(temporary, final)
            whole_file.make_durable(self._root)
        tidy(self._root)
        for path in [p for p in newest_first(self._root) if p != final][request.keep - 1 :]:
            discard(path)


@contextmanager
def _named(final: Path) -> Iterator[None]:
    """Say in an error of the disk which checkpoint it was in the way of."""
    try:
        yield
    except OSError as error:
        raise told(f"cannot write checkpoint {final}", error) from error
