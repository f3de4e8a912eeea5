"""Trackers show the rows of a run, whatever package they are of."""

import re
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest
from training.trackers import PACKAGES

from dbkernels.training.log import RunLog, read_log
from dbkernels.training.tracking import mlflow as ours_of_mlflow
from dbkernels.training.tracking.mlflow import flat
from dbkernels.training.tracking.registry import TRACKERS, TrackerName, require_trackers

ROOT = Path(__file__).parents[2]
CONFIG = {"family": "vit", "model": {"dim": 8, "sizes": [1, 2]}, "data": "x" * 600}
SHOWN = {"loss/block0": [(0, 1.5)], "lr/block0": [(0, 0.25)], "loss/block2": [(1, 3.0)]}
ROWS = [
    {"step": 0, "block": 0, "loss": 1.5, "lr": 0.25},
    {"step": 1, "block": 2, "loss": 3.0},
]


@pytest.fixture(params=sorted(PACKAGES))
def package(request, monkeypatch):
    """The name of a package, and the runs that it shows."""
    runs = []
    monkeypatch.setitem(sys.modules, request.param, PACKAGES[request.param](runs))
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return request.param, runs


def logged(directory, name, rows, *, finished=True, **more):
    log = RunLog(directory, track=[name], config=CONFIG, **more)
    for row in rows:
        log.write(row)
    log.close(finished=finished)


def test_a_tracker_shows_each_number_of_each_block_and_the_configuration(package, tmp_path):
    name, runs = package
    logged(tmp_path / "three", name, ROWS)
    (run,) = runs
    assert run.curves == SHOWN and run.ends == ["finished"]
    assert run.name.startswith("three-") and len(run.name) == len("three-") + 8
    assert run.options["project"].endswith("dbkernels")
    expected = dict(flat(CONFIG)) if name == "mlflow" else CONFIG
    assert run.config == expected
    # the rows are in the log as they are without it
    assert read_log(tmp_path / "three" / "log.jsonl") == ROWS


def test_a_run_that_goes_on_is_the_same_one_and_a_new_one_is_another(package, tmp_path):
    name, runs = package
    logged(tmp_path / "run", name, ROWS[:1], finished=False)
    logged(tmp_path / "run", name, ROWS[1:], first_step=1)
    parts = [run.curves for run in runs]
    if name == "wandb":  # which puts parts of one id together itself
        assert parts == [{k: v for k, v in SHOWN.items() if "0" in k}, {"loss/block2": [(1, 3.0)]}]
        assert runs[0].id == runs[1].id and runs[0].ends == ["failed"]
    else:
        assert parts == [SHOWN]
    names = {run.name for run in runs}
    assert len(names) == 1
    (tmp_path / "run" / "log.jsonl").unlink()
    logged(tmp_path / "run", name, ROWS)
    assert runs[-1].name not in names


def test_a_run_that_ended_early_is_shown_so(package, tmp_path):
    name, runs = package
    logged(tmp_path, name, ROWS, finished=False)
    assert runs[0].ends == ["finished" if name == "trackio" else "failed"]


def test_a_run_that_mlflow_knew_as_ended_runs_again(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setitem(sys.modules, "mlflow", PACKAGES["mlflow"](runs))
    logged(tmp_path, "mlflow", ROWS[:1], finished=False)
    logged(tmp_path, "mlflow", ROWS[1:], first_step=1)
    assert runs[0].ends == ["failed", "RUNNING", "finished"]


def test_mlflow_gets_rows_together_and_none_too_late(monkeypatch, tmp_path):
    runs, now = [], [0.0]
    monkeypatch.setitem(sys.modules, "mlflow", PACKAGES["mlflow"](runs))
    monkeypatch.setattr(ours_of_mlflow.time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path, track=["mlflow"])
    log.write(ROWS[0])
    assert not runs[0].curves
    now[0] = ours_of_mlflow.SECONDS
    log.write(ROWS[1])
    assert runs[0].curves == SHOWN
    many = [{"step": step, "block": 1, "loss": 1.0} for step in range(2, 2102)]
    for row in many:
        log.write(row)
    log.close()
    assert [step for step, _ in runs[0].curves["loss/block1"]] == [row["step"] for row in many]


def test_long_and_nested_settings_are_parameters_of_mlflow():
    assert dict(flat(CONFIG)) == {
        "family": "vit",
        "model.dim": "8",
        "model.sizes": "[1, 2]",
        "data": "x" * ours_of_mlflow.LONGEST,
    }


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, ("offline", "dbkernels", None)),
        ({"WANDB_MODE": "online", "WANDB_PROJECT": "mine"}, ("online", "mine", "allow")),
        ({"WANDB_MODE": "disabled"}, ("disabled", "dbkernels", None)),
    ],
)
def test_wandb_stays_offline_unless_told_otherwise(monkeypatch, tmp_path, environment, options):
    runs = []
    monkeypatch.setitem(sys.modules, "wandb", PACKAGES["wandb"](runs))
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logged(tmp_path, "wandb", ROWS)
    assert tuple(runs[0].options[key] for key in ("mode", "project", "resume")) == options
    assert runs[0].options["dir"] == str(tmp_path) and runs[0].options["console"] == "off"


def test_tensorboard_gets_every_number_of_every_block(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, "tensorboard", ROWS)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in SHOWN}
    assert curves == SHOWN and sorted(events.Tags()["scalars"]) == sorted(SHOWN)


def test_each_tracker_is_in_the_table_of_its_page_and_has_an_extra():
    page = (ROOT / "docs" / "tracking.md").read_text()
    extras = re.findall(
        r"^\| `(\w+)` \|.* `pip install dbkernels\[(\w+)\]` \|$", page, re.MULTILINE
    )
    assert extras == [(name, name) for name in TRACKERS]
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in TRACKERS)
    assert tuple(TRACKERS) == get_args(TrackerName)


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_missing_package_is_said_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    message = rf"{name} must be installed to track a run \(pip install dbkernels\[{name}\]\), got"
    with pytest.raises(ValueError, match=message):
        RunLog(tmp_path / "run", track=[name])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["neptune"], "track must be one of tensorboard, wandb, mlflow, trackio, got neptune"),
        (["tensorboard", "tensorboard"], "track must name a tracker once, got tensorboard twice"),
    ],
)
def test_refuses_trackers_that_cannot_be(names, message):
    with pytest.raises(ValueError, match=message):
        require_trackers(names)


def test_a_tracker_that_fails_ends_no_run(package, tmp_path, monkeypatch):
    name, _ = package
    log = RunLog(tmp_path, track=[name, "tensorboard"])
    log.write(ROWS[0])

    def fail(*_, **__):
        raise OSError("no room")

    for method in ("write", "close"):
        monkeypatch.setattr(TRACKERS[name].make, method, fail)
    with pytest.warns(UserWarning, match=f"{name} shows nothing from step 1 on: no room"):
        log.write(ROWS[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        log.write(ROWS[1] | {"step": 2})
        log.close()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2]
    log = RunLog(tmp_path, first_step=2, track=[name])
    with pytest.warns(UserWarning, match=f"{name} lacks the last rows: no room"):
        log.close()


def test_a_tracker_that_cannot_open_leaves_the_log_as_it_was(package, tmp_path, monkeypatch):
    name, runs = package
    logged(tmp_path, "tensorboard", ROWS)

    def fail(*_, **__):
        raise RuntimeError("no key")

    monkeypatch.setattr(TRACKERS[name].make, "__init__", fail)
    with pytest.raises(ValueError, match=f"{name} must be able to show the run, got no key"):
        RunLog(tmp_path, track=["tensorboard", name])
    assert read_log(tmp_path / "log.jsonl") == ROWS and not runs
    RunLog(tmp_path, first_step=2).close()
