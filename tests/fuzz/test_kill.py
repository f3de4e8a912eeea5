import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("kill.py")


def test_a_few_ends_of_a_run_cost_no_bit():
    # in a process of its own: a fork of this one, which has more threads, might hang
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZ), "--kills", "4", "--seed", "3", "--steps", "12"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "4 ends: 0 wrong\n"), ended
