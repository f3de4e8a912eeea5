"""The fuzzes at a small size and with fixed seeds, each in a process that has no threads yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    "words", [["cli.py", "--cases", "12", "--seed", "7"], ["files.py", "--cases", "150"]]
)
def test_a_small_fuzz_ends_with_nothing_wrong(words):
    paths = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(FOLDER / words[0]), *words[1:]]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "none " in done.stdout
