"""Jobs in processes of their own, which end with this one."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from dbkernels.planning.with_parent import end_with_parent

Result = TypeVar("Result")


def processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes; the thread that first gives it a job must outlive it."""
    # a forked process can use neither torch's threads nor a GPU that its parent has begun to use
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, end_with_parent, (os.getpid(),))


def results(jobs: Sequence[Callable[[], Result]], *, most: int | None = None) -> Iterator[Result]:
    """What each job returns, in their order, as it is found.

    Args:
        jobs:  that can be pickled
        most:  processes to use; 1 is this one, None is one for each processor
    """
    count = min(most or os.cpu_count() or 1, len(jobs))
    if count == 1:
        yield from (job() for job in jobs)
        return
    with processes(count) as pool:
        yield from (future.result() for future in [pool.submit(job) for job in jobs])
