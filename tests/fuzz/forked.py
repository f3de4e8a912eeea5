"""One case of a fuzz in a process of its own, with little memory and not much time."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MEMORY = 6 * 2**30  # bytes of address space that a case may use beyond those of its parent
SECONDS = 20  # a case that takes longer hangs


class Ended(NamedTuple):
    code: int | None  # None: it was killed because it took too long; negative: by a signal
    out: str
    err: str


def forked(case: Callable[[], None], seconds: float = SECONDS) -> Ended:
    """Run a case as a program would run: what it raises is a traceback and an exit of 1."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as err,
    ):
        child = os.fork()
        if not child:
            _run(case, out.fileno(), err.fileno())
        code = _wait(child, time.monotonic() + seconds)
        out.seek(0), err.seek(0)
        return Ended(code, out.read(), err.read())


def _run(case: Callable[[], None], out: int, err: int) -> None:
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)
    # a test's own are caught elsewhere
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    code = 0
    try:
        case()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _wait(child: int, end: float) -> int | None:
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
