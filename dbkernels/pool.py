"""Jobs in processes of their own, which end with this one."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from dbkernels.with_parent import end_with_parent

Result = TypeVar("Result")


def processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes; the thread that first gives it a job must outlive it."""
    # a forked process can use neither torch's threads nor a GPU that its parent has begun to use
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, end_with_parent, (os.getpid(),))


def results(
    jobs: Sequence[Callable[[], Result]], *, most: int | None = None, ahead: int | None = None
) -> Iterator[Result]:
    """What each job returns, in their order, as it is found.

    Args:
        jobs:   that can be pickled
        most:   processes to use; 1 is this one, None is one for each processor
        ahead:  jobs that may be begun before an earlier one's result is asked for; None is all.
                After an error those that are not begun yet are not done
    """
    count = min(most or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        yield from (job() for job in jobs)
        return
    waiting: deque[Future[Result]] = deque()
    with processes(count) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if ahead is not None and len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
