import os
import signal
import subprocess
import sys

import pytest
from cli.runs import Lock, until

from dbkernels.cli import bench_child
from dbkernels.cli.bench_child import ended, sigterm_as_interrupt

# begins, where it is told to, another process that holds the lock too
PROGRAM = """if True:
    import fcntl, subprocess, sys, time
    lock = open("lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
    for _ in sys.argv[1:]:
        subprocess.Popen(sleep, pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)
    print("ready", flush=True)
    time.sleep(300)
"""
READER = """if True:
    import os, pathlib, runpy, sys
    child = runpy.run_path(sys.argv[1])
    settings = {"said": sys.stderr, "cwd": pathlib.Path(), "environment": os.environ}
    with child["ended"]([sys.executable, "-c", sys.argv[2]], **settings) as process:
        print(process.stdout.readline(), end="", flush=True)
        process.wait()
"""


def run(tmp_path, said, code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return ended(command, said=said, cwd=tmp_path, environment={**os.environ, "ASKED": "1"})


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_program_and_what_it_began_do_not_outlive_their_reader(tmp_path, end):
    with (
        pytest.raises(end),
        (tmp_path / "said").open("w") as said,
        run(tmp_path, said, PROGRAM, "another") as process,
    ):
        assert process.stdout.readline() == "ready\n"
        assert not Lock(tmp_path / "lock").is_free()
        raise end
    assert process.returncode == -signal.SIGKILL
    until(Lock(tmp_path / "lock").is_free)


def test_a_program_does_not_outlive_a_reader_that_is_killed(tmp_path):
    reader = [sys.executable, "-c", READER, bench_child.__file__, PROGRAM]
    with subprocess.Popen(reader, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert not Lock(tmp_path / "lock").is_free()
        process.kill()
    until(Lock(tmp_path / "lock").is_free)


def test_a_program_has_its_arguments_its_place_and_its_status(tmp_path):
    code = """if True:
        import os, sys
        print(sys.argv[1:], os.getcwd(), os.environ["ASKED"])
        sys.exit("it failed")
    """
    with (tmp_path / "said").open("w+") as said:
        with run(tmp_path, said, code, "a b", "--c") as process:
            assert process.stdout.read() == f"['a b', '--c'] {tmp_path} 1\n"
        said.seek(0)
        assert process.returncode == 1 and said.read() == "it failed\n"


def test_sigterm_is_an_interrupt_within_and_not_after():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
