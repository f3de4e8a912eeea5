"""Jobs in processes of their own, with a bar on stderr that says how long they will take."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Result = TypeVar("Result")


def processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes."""
    # a forked process can use neither torch's threads nor a GPU that its parent has begun to use
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def results(
    jobs: Sequence[Callable[[], Result]], told: str, *, most: int | None = None
) -> Iterator[Result]:
    """What each job returns, in their order, as it is found.

    Args:
        jobs:  that can be pickled
        told:  what they do, in a word beside the bar
        most:  processes to use; 1 is this one, None is one for each processor
    """
    count = min(most or os.cpu_count() or 1, len(jobs))
    if count == 1:
        yield from (job() for job in jobs)
        return
    console = Console(stderr=True)
    # what is printed meanwhile belongs to stdout
    shown = Progress(
        console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    )
    with shown, processes(count) as pool:
        futures = [pool.submit(job) for job in jobs]
        yield from shown.track((future.result() for future in futures), len(jobs), description=told)
