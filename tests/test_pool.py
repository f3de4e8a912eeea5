"""Processes of a pool, and what becomes of them when this one is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
from functools import partial
from dbkernels.pool import results
wait = "import os, time; open(f'started-{os.getpid()}', 'w').close(); time.sleep(600)"
list(results([partial(exec, wait)] * 2, most=2))
"""


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("when", ["they have begun", "they start"])
def test_workers_end_with_their_parent(tmp_path, monkeypatch, number, when):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path)
    try:
        until(lambda: len(children(parent.pid)) >= 2)
        if when == "they have begun":
            until(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = children(parent.pid)
    finally:
        parent.send_signal(number)
        parent.wait()
    until(lambda: not any(map(lives, workers)))


def test_a_process_whose_parent_is_gone_already_does_not_begin():
    program = Path(__file__).parents[1] / "dbkernels/with_parent.py"
    command = [sys.executable, "-IS", str(program)]
    run = ["/bin/echo", "begun"]
    done = subprocess.run([*command, str(os.getpid()), *run], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "begun\n")
    done = subprocess.run([*command, "1", *run], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
