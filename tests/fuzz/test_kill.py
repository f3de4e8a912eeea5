import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent


@pytest.mark.parametrize(
    ("program", "options"),
    [("kill.py", "--kills 4 --seed 3 --steps 12"), ("kill_saver.py", "--kills 40 --seed 3")],
)
def test_ends_of_a_run_and_of_its_saves_cost_no_bit(program, options):
    # in a process of its own: a fork of this one, which has more threads, might hang
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZ / program), *options.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    kills = options.split()[1]
    assert (ended.returncode, ended.stdout) == (0, f"{kills} ends: 0 wrong\n"), ended
