import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs the script with a python that has other options, or answers a benchmark itself."""

    def run(*words, options="", stub=""):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/bash\n{stub}\nexec {sys.executable} {options} "$@"\n')
        python.chmod(0o755)
        env = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", str(ROOT / "tools" / "gpu.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("-S", "gpu.sh needs packages that .* lacks, .* tools/gpu_wheels.sh fetches: .*tyro"),
        ("", "gpu.sh needs an NVIDIA GPU"),
    ],
)
def test_says_what_is_missing(gpu_sh, options, sentence):
    done = gpu_sh(options=options)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(sentence, done.stderr)


# in the benchmarks' place: one writes a row and fails, one takes too long, the others do nothing
STUB = """case "$*" in
*benchmarks/training.py*S/2*|*gpu_jobs.py*|*gpu_table.py*|*gpu_time.py*|-c*) ;;
*benchmarks/ops.py*) echo '{"half": 1}'; echo 'no such kernel' >&2; exit 3;;
*) exit 0;;
esac"""


def test_a_job_that_fails_is_named_and_the_others_run(gpu_sh):
    done = gpu_sh("--rehearse", "kernels", "rest", stub=STUB.replace("S/2", "none"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Failed: kernels/kernels.jsonl")
    assert "no such kernel" in done.stderr
    assert re.search(r"kernels/kernels.jsonl\tfailed with 3 in \d+ s", done.stdout)
    assert re.search(r"rest/profile.ndjson\tdone in \d+ s", done.stdout)
    assert "smoke/" not in done.stdout
    assert "about" in done.stdout.splitlines()[0]  # the estimate


@pytest.mark.parametrize(("patience", "limit"), [(None, 900), ("2", 1800)])
def test_whoever_has_more_minutes_says_so(gpu_sh, monkeypatch, patience, limit):
    if patience:
        monkeypatch.setenv("PATIENCE", patience)
    done = gpu_sh("--rehearse", "kernels", stub=STUB.replace("exit 3", "exit 124"))
    assert f"kernels/kernels.jsonl\tcut off at its limit of {limit} s" in done.stdout


def test_a_rehearsal_leaves_nothing_among_the_results(gpu_sh):
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    assert gpu_sh("--rehearse", "rest", stub=STUB.replace("S/2", "none")).returncode == 0
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before


def test_an_unknown_part_is_refused(gpu_sh):
    done = gpu_sh("--rehearse", "everything")
    assert done.returncode == 1 and "a part must be one of smoke" in done.stderr


def test_wheels_are_of_the_machines_python_and_from_no_named_host():
    text = (ROOT / "tools" / "gpu_wheels.sh").read_text()
    assert "--python-version 3.12" in text and "--no-deps" in text and "://" not in text
    assert ".whl/" in (ROOT / ".gitignore").read_text().split()
