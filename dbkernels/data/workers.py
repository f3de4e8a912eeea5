"""Processes that read the samples of coming steps, so that no step waits for what they decode.

A step's samples are named by the seed, the block and the block's own step, so they are known before
the step is due. Workers are those of torch's DataLoader: one reads all samples of a step. They have
the data alone: nothing of a model, and nothing that is on a GPU.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dbkernels.data.images import Batch, Data, batch_indices
from dbkernels.settings import check_number
from dbkernels.with_parent import end_with_parent

MOST_WORKERS = 1024
AHEAD = 2  # steps that each worker reads before they are asked for
SECONDS = 5.0  # that a worker has to end in
# a scheduler sends these to every process of a run, which answers for all of them
ENDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, 0)  # 0: of its parent's SIGTERM

OfStep = tuple[int, int]  # a block, and its own step
Coming = Callable[[], Iterator[OfStep]]
EVERY = slice(None)
Request = tuple[int, int, object]  # with the indices of its samples


class Workers:
    """Reads the samples of steps before they are asked for.

    The processes begin with the first step that is asked for. They begin as the default of Python's
    multiprocessing has it.

    Args:
        data:        of which they read; each has it as this process does
        count:       of processes, 1 or more
        batch_size:  samples of a step
        seed:        of the run
        on_gpu:      whether samples are for a GPU: they lie in page-locked memory then, as they are
                     stored, where the data tell that from what a model reads (`Data`)
        share:       of the samples of each step, those that are read
    """

    def __init__(
        self,
        data: Data,
        count: int,
        *,
        batch_size: int,
        seed: int,
        on_gpu: bool = False,
        share: slice = EVERY,
    ):
        check_number("workers", count, 1, MOST_WORKERS)
        self.data, self._count, self._on_gpu = data, count, on_gpu
        self._requests = _Requests(data, batch_size, seed, share)
        self._loader: DataLoader | None = None
        self._batches: Iterator[Batch | str] | None = None
        self._processes: list[multiprocessing.Process] = []

    def expect(self, coming: Coming) -> None:
        """Learn which steps will be asked for.

        Args:
            coming:  gives them, from the next one on, whenever it is called
        """
        self._requests.coming = coming

    def take(self, block: int, step: int) -> Batch | None:
        """The samples of a step, on the host; `finish` makes of them what a model reads.

        Returns:
            None where the step was not expected, and so is to be read by this process.
        Raises:
            ValueError: a sample cannot be used.
            ChildProcessError: a worker has ended.
        """
        asked = self._requests.asked
        try:
            if not asked or asked[0] != (block, step):
                if next(self._requests.coming(), None) != (block, step):
                    return None
                self._begin()
            asked.popleft()
            found = next(self._batches)
        # one that ends while it hands tensors over breaks a connection
        except (RuntimeError, OSError, EOFError):
            ended = [-code for code in self._ended()]
            self.close()
            if not ended:
                raise
            if set(ended) <= set(ENDED):
                return None
            raise ChildProcessError(_told(ended[0])) from None
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def finish(self, batch: Batch) -> Batch:
        """What a model reads of samples that were taken, or of some of them, wherever they are."""
        stored = self._on_gpu and hasattr(self.data, "finish")
        return self.data.finish(batch) if stored else batch

    def _begin(self) -> None:
        """Have workers read from the next expected step on."""
        in_main = threading.current_thread() is threading.main_thread()
        if self._loader is None:
            self._loader = DataLoader(
                _Reader(self.data, stored=self._on_gpu),
                batch_size=None,
                sampler=self._requests,
                num_workers=self._count,
                prefetch_factor=AHEAD,
                collate_fn=_as_it_is,
                pin_memory=self._on_gpu,
                persistent_workers=True,
                # the kernel looks at the thread that began a process, and others may end before
                worker_init_fn=partial(_begin_worker, os.getpid() if in_main else None),
                # else torch's own is drawn from, which other things of a run may draw from too
                generator=torch.Generator(),
            )
        before = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD) if in_main else None
        self._batches = iter(self._loader)
        if handler is not None:
            # torch would raise wherever a step is when a worker ends; `take` finds it out too
            signal.signal(signal.SIGCHLD, handler)
        self._processes += set(multiprocessing.active_children()).difference(before)

    def _ended(self) -> list[int]:
        """Exit codes of the workers that have ended, or do so in a moment."""
        ended = wait([process.sentinel for process in self._processes], timeout=SECONDS)
        gone = [process for process in self._processes if process.sentinel in ended]
        for process in gone:
            process.join()
        return [process.exitcode or 0 for process in gone]

    def close(self) -> None:
        """End the processes; a step that is taken begins them again."""
        self._requests.asked.clear()
        self._batches = self._loader = None  # with which torch ends its workers
        for process in self._processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []


class _Requests(Sampler):
    """What is asked of the workers, in its order, and which of it has not been taken yet."""

    def __init__(self, data: Data, batch_size: int, seed: int, share: slice):
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._share = share
        self.asked: deque[OfStep] = deque()
        self.coming: Coming = lambda: iter(())

    def __iter__(self) -> Iterator[Request]:
        self.asked.clear()
        for block, step in self.coming():
            self.asked.append((block, step))
            of_step = {"seed": self._seed, "block": block, "step": step}
            indices = batch_indices(len(self._data), self._batch_size, **of_step)
            yield block, step, indices[self._share].numpy()


class _Reader(Dataset):
    """What a worker does: the samples of a request, or why there are none."""

    def __init__(self, data: Data, *, stored: bool):
        self._read = getattr(data, "read", data.batch) if stored else data.batch

    def __getitem__(self, request: Request) -> Batch | str:
        block, step, indices = request
        try:
            return self._read(torch.from_numpy(indices))
        except ValueError as error:
            return str(error)
        except Exception as error:
            return (
                f"the samples of block {block} at its step {step} must be read without an error, "
                f"got {type(error).__name__}: {error}; workers=0 shows where"
            )


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch


def _begin_worker(parent: int | None, _: int) -> None:
    if parent is not None:
        end_with_parent(parent)
    # Ctrl-C reaches every process of a terminal, and the run answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _told(ended: int) -> str:
    name = signal.Signals(ended).name if ended > 0 else f"exit code {-ended}"
    why: dict[int, str] = {
        signal.SIGKILL: ", as where memory runs out",
        signal.SIGBUS: f", as where /dev/shm is full ({_free_in_shm()} MiB are free)",
    }
    return (
        f"workers must live as long as the run reads, got one that ended with {name}"
        f"{why.get(ended, '')}; the run can go on with fewer workers"
    )


def _free_in_shm() -> int:
    found = os.statvfs("/dev/shm")
    return found.f_bavail * found.f_frsize // 2**20
