"""Checkpoints that are written by a thread while the run goes on."""

import copy
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import ProcessGroup

from dbkernels.training.checkpoint.host_copy import HostCopy
from dbkernels.training.checkpoint.part import Part, part_of
from dbkernels.training.checkpoint.saving import Request, save_part
from dbkernels.training.checkpoint.shard import Parts
from dbkernels.training.checkpoint.writers import Alone, writers_of
from dbkernels.training.tensor_file import Read, pieces


class Saver:
    """Saves what a run holds at one moment while it goes on; one checkpoint at a time.

    A save stands still while it copies what it writes to the host: as much host memory is kept for
    the next one, until `close`. A checkpoint is published when it is durable, as `save` does it, so
    until then `latest` is an earlier one. A context closes it.

    Args:
        group:  processes that save together; each makes one. It gets a group of its own, of gloo,
                whose messages never meet those of the training
    """

    def __init__(self, *, group: ProcessGroup | None = None):
        alone = isinstance(writers_of(group), Alone)
        self._writers = writers_of(None if group is None or alone else _copied(group))
        self._host, self._pool = HostCopy(), ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Path] | None = None

    def save(
        self,
        root: Path,
        step: int,
        tensors: Parts,
        state: dict,
        *,
        keep: int = 2,
        read: Read = pieces,
        finite: Collection[str] = (),
    ) -> None:
        """Copy what a checkpoint holds, and have it written; return when it is copied.

        The arguments are those of the function `save`. What it would raise, `check`, the next call
        of this or `close` raises; so they do of an error of the copying. A block that rests on disk
        is read here, by `read`.

        Raises:
            ValueError, FloatingPointError, OSError, RuntimeError: the checkpoint before this one
                was not saved; neither is this one then.
        """
        self.wait()
        request, part = Request(root, step, state, keep, finite), Future[Part]()
        try:
            request.check()
            request = Request(root, step, copy.deepcopy(state), keep, frozenset(finite))
            own = part_of(tensors, self._writers.rank, self._writers.count)
            part.set_result(self._host.of(own, read))
        except Exception as error:
            # the other ranks wait for this one in the save, and hear of it there
            part.set_exception(error)
        self._saving = self._pool.submit(save_part, request, part.result, pieces, self._writers)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._saving is not None and not self._saving.done()

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, if that is known; for every step to call.

        Of several processes, which come to know it at different steps, none raises it here: the
        next `save` does, in all of them.
        """
        if not self.busy and isinstance(self._writers, Alone):
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is published; raise what went wrong with it."""
        if self._saving is None:
            return
        try:
            self._saving.result()
        finally:
            # one who is interrupted here may wait again
            if not self.busy:
                self._saving = None

    def close(self) -> None:
        """`wait`, and give back the thread and the host memory."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._host.free()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            # the error that ends the run is told, and this one beside it
            warnings.warn(f"the last checkpoint is lost: {failed}", stacklevel=2)


def _copied(group: ProcessGroup) -> ProcessGroup:
    """A group of the same processes, which stays until the last group goes.

    A new one of the same processes would find the addresses of one that is gone, and wait there.
    """
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
