"""Tests marked gpu run without a GPU where they are asked to, and as ever where they are not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_tests(*options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_a_rehearsal_runs_what_it_can_and_names_and_counts_the_rest():
    chosen = ["tests/training/test_on_gpu.py", "-k", "locked_pages or survives_a_swap"]
    code, text = run_tests("--rehearse", "-m", "gpu", *chosen)
    assert code == 0 and "1 passed, 1 skipped" in text
    assert "needs a GPU: pages that CUDA locks" in text
    assert "needs a GPU, so not rehearsed: 1 tests" in text


def test_without_being_asked_no_test_marked_gpu_runs():
    code, text = run_tests("tests/training/test_on_gpu.py")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED and "deselected" in text
    assert "rehearsed" not in text
