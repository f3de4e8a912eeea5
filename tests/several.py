"""A few processes that meet as torchrun's do, forked from this one: no import is paid for again."""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from dbkernels.training.parallel.job import open_job
from dbkernels.with_parent import end_with_parent

CPU = torch.device("cpu")
SECONDS = 120  # that a job may take beside a busy machine


class Ended(NamedTuple):
    code: int | None  # negative: by a signal; None: it was killed because it took too long
    out: str
    err: str


class Launched:
    """Processes of one job, as torchrun starts them; what they print goes into files.

    Args:
        work:    (rank) -> nothing, in each process
        world:   their number
        folder:  of what they print
    """

    def __init__(self, work, world, folder):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._server, self._port = _serve()
        self.pids = [self._fork(work, rank, world) for rank in range(world)]
        self._codes = {}

    def _fork(self, work, rank, world):
        pid = os.fork()
        if not pid:
            _run(lambda: work(rank), self._environment(rank, world), *self._files(rank))
        return pid

    def _environment(self, rank, world):
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def _files(self, rank):
        return self._folder / f"out{rank}", self._folder / f"err{rank}"

    def kill(self, number, *ranks):
        """Send some of them a signal; none named is all."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def ended(self, seconds=SECONDS):
        """How each of them ended, by rank."""
        end = time.monotonic() + seconds
        while len(self._codes) < len(self.pids) and time.monotonic() < end:
            for rank in range(len(self.pids)):
                self._reap(rank, os.WNOHANG)
            time.sleep(0.01)
        late = set(range(len(self.pids))) - set(self._codes)
        for rank in late:
            os.kill(self.pids[rank], signal.SIGKILL)
            self._reap(rank, 0)
        if self._server:
            os.kill(self._server, signal.SIGKILL)
            os.waitpid(self._server, 0)
            self._server = 0
        return [
            Ended(None if rank in late else self._codes[rank], *self._printed(rank))
            for rank in range(len(self.pids))
        ]

    def _reap(self, rank, how):
        if rank not in self._codes:
            done, status = os.waitpid(self.pids[rank], how)
            if done:
                self._codes[rank] = os.waitstatus_to_exitcode(status)

    def _printed(self, rank):
        return [path.read_text() for path in self._files(rank)]


def _serve():
    """A process with the store where others meet, as torchrun's own has it; its number and port.

    Threads of a store here would be asking for names of addresses while processes are forked, which
    would then have the lock of such questions as one that nobody gives back.
    """
    parent, (mine, its) = os.getpid(), os.pipe()
    pid = os.fork()
    if not pid:
        end_with_parent(parent)
        wait = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
        os.write(its, str(store.port).encode())
        os.close(its)
        while True:
            signal.pause()
    os.close(its)
    with open(mine) as told:
        return pid, int(told.read())


_met = 0


@contextmanager
def met(blocks=None, block=None, tensor=1):
    """As `open_job`, as often as a process likes: each time under names that nobody had before."""
    global _met
    _met += 1
    rank, world, port = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = dist.PrefixStore(str(_met), dist.TCPStore("127.0.0.1", port, is_master=False))
    begin, told = dist.init_process_group, {"store": store, "rank": rank, "world_size": world}
    dist.init_process_group = partial(begin, **told)
    try:
        with open_job(CPU, blocks=blocks, block=block, tensor=tensor) as job:
            yield job
    finally:
        dist.init_process_group = begin


def _run(work, environment, out, err):
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    # a test's own are caught elsewhere
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
    # of threads of its parent a fork has none
    torch.set_num_threads(1)
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def together(work, world, folder):
    """Have processes do something, and see that all of them come to its end."""
    for rank, each in enumerate(Launched(work, world, folder).ended()):
        assert each.code == 0, f"rank {rank}: {each.code}\n{each.err[-4000:]}"
