import importlib
import sys
from pathlib import Path

import pytest
import tyro

from dbkernels.cli.bench_jobs import LARGE, jobs

ROOT = Path(__file__).parents[2]
EVERY = [(full, on_gpu) for full in (False, True) for on_gpu in (False, True)]


@pytest.mark.parametrize(("full", "on_gpu"), EVERY)
def test_every_job_is_a_benchmark_that_takes_its_arguments(monkeypatch, full, on_gpu):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # folders of tests have these names too
    for name in ("ops", "training"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for job in jobs(full=full, on_gpu=on_gpu):
        options = importlib.import_module(job.program.removesuffix(".py")).Options
        # refuses, with its own checks, what it would refuse there
        tyro.cli(options, args=["--json", *job.arguments, "--device", "cpu"])


@pytest.mark.parametrize(("full", "on_gpu"), EVERY)
def test_a_step_is_drawn_op_after_op(full, on_gpu):
    programs = [job.program for job in jobs(full=full, on_gpu=on_gpu)]
    assert programs.count("timeline.py") == 1


@pytest.mark.parametrize(("full", "on_gpu"), EVERY)
def test_graphs_are_measured_where_there_is_a_gpu_and_by_jobs_of_their_own(full, on_gpu):
    made = jobs(full=full, on_gpu=on_gpu)
    graphs = [job for job in made if "graph" in job.arguments]
    assert len(graphs) == (0 if not on_gpu else len(LARGE) if full else 1)
    assert all(job.name.endswith("-graphs") for job in graphs)


@pytest.mark.parametrize(("full", "on_gpu"), EVERY)
def test_results_of_two_jobs_do_not_meet(full, on_gpu):
    names = [job.name for job in jobs(full=full, on_gpu=on_gpu)]
    assert len(names) == len(set(names))
    assert all(name.startswith("full-" if full else "quick-") for name in names)
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_quick_ones_are_thought_to_take_eight_minutes_at_most(on_gpu):
    assert sum(job.seconds for job in jobs(full=False, on_gpu=on_gpu)) <= 480


@pytest.mark.parametrize(("full", "on_gpu"), EVERY)
def test_every_model_that_a_gpu_trains_is_run_or_predicted(full, on_gpu):
    made = jobs(full=full, on_gpu=on_gpu)
    asked = [job.arguments[3] for job in made if job.program == "training.py"]
    assert set(LARGE) <= set(asked)
