"""What the processes of a job do together, as in a save: all of it, or one error in all of them.

Each does its part and tells the first rank how that went, which tells all. No two others wait for
each other, so that those which are left hear at once of one that died, and not after the group's
timeout, as in a collective of all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

Found = TypeVar("Found")
KINDS: tuple[type[Exception], ...] = (FloatingPointError, ValueError, OSError)  # others: Runtime


class _Failure(NamedTuple):
    """An error of a rank, for the others to raise too."""

    kind: int  # of KINDS, or their number
    text: str
    errno: int | None

    def error(self) -> Exception:
        """An error that is the same on each rank."""
        found = [*KINDS, RuntimeError][self.kind](self.text)
        if isinstance(found, OSError):
            found.errno = self.errno
        return found


class Alone:
    """One process, whose errors are its own."""

    rank, count = 0, 1

    def do(self, action: Callable[[], Found]) -> list[Found]:
        """As `Writers.do`."""
        return [action()]


class Writers:
    """The processes of a group, of which each calls `do` as often as the others.

    Args:
        group:  of gloo, or of another backend that sends objects
    """

    def __init__(self, group: ProcessGroup):
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def do(self, action: Callable[[], Found]) -> list[Found]:
        """Do something on each rank; return when all are done.

        Args:
            action:  its result can be sent to other processes
        Returns:
            What it gave, by rank; on any rank but the first, only what it gave on the first.
        Raises:
            FloatingPointError, ValueError, OSError, RuntimeError: it failed on a rank, or a rank
                died. All that are left raise the same.
        """
        found, own = None, None
        try:
            found = action()
        except BaseException as error:
            # the others wait for an answer, whatever it is
            own = error
        answers = self._answers((_failure(self.rank, own), found))
        failure = next((failure for failure, _ in answers if failure), None)
        if own is not None and not isinstance(own, Exception):
            raise own
        if failure:
            raise failure.error() from own
        return [found for _, found in answers]

    def _answers(self, own: tuple[_Failure | None, Any]) -> list[tuple[_Failure | None, Any]]:
        """Of every rank to the first; of that one, with a failure of any, to the others."""
        if self.rank:
            try:
                dist.send_object_list([own], group=self._group, group_dst=0)
                return self._received(0)
            except RuntimeError as error:
                return [(_gone(0, error), None)]
        answers = [own]
        for rank in range(1, self.count):
            try:
                answers += self._received(rank)
            except RuntimeError as error:
                answers.append((_gone(rank, error), None))
        failure = next((failure for failure, _ in answers if failure), None)
        for rank in range(1, self.count):
            try:
                dist.send_object_list([(failure, own[1])], group=self._group, group_dst=rank)
            except RuntimeError as error:
                answers.append((_gone(rank, error), None))
        return answers

    def _received(self, rank: int) -> list[tuple[_Failure | None, Any]]:
        answer: list[Any] = [None]
        dist.recv_object_list(answer, group=self._group, group_src=rank)
        return answer


def _failure(rank: int, error: BaseException | None) -> _Failure | None:
    if error is None:
        return None
    kind = next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS))
    name = "" if kind < len(KINDS) else f"{type(error).__name__}: "
    errno = error.errno if isinstance(error, OSError) else None
    return _Failure(kind, f"rank {rank}: {name}{error}", errno)


def _gone(rank: int, error: RuntimeError) -> _Failure:
    # the sentences behind the first are advice of the library
    return _Failure(len(KINDS), f"rank {rank} has left the job: {str(error).split('. ')[0]}", None)


def writers_of(group: ProcessGroup | None) -> Alone | Writers:
    """Those that save together; a group of one is alone."""
    return Alone() if group is None or dist.get_world_size(group) == 1 else Writers(group)
