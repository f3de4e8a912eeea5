"""Programs that do not outlive `python -m dbkernels bench`, however it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# between fork and exec no code of ours may run, as the parent has threads: so the child asks for it
# in a Python of its own, and then becomes the program, if its parent is still the one that is named
WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def ended(
    command: Sequence[str], *, said: TextIO, cwd: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """A program that is killed, with all that it began, where what reads it ends early.

    On Linux it ends also where this process is killed.

    Args:
        command:      to run; the first word is a path
        said:         gets what it writes on stderr
        cwd:          where it runs
        environment:  its own
    Returns:
        a context with the process, whose stdout is text to read.
    """
    if sys.platform == "linux":
        command = [sys.executable, "-ISc", WITH_PARENT, str(os.getpid()), *command]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        # a group of its own, so that one signal reaches the processes that it began
        start_new_session=True,
    )
    with process:
        try:
            yield process
        except BaseException:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does; of the main thread alone."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
