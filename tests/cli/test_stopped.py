"""Runs of the command line that end early, and what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli.runs import read_tree, refused

from dbkernels.cli import train as train_module
from dbkernels.training.stop import ASKING

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ask(monkeypatch):
    """Has the third step of runs send this process a signal."""
    inner = train_module.ProgressBar.step

    def set_up(number):
        def step(bar, done, text=""):
            inner(bar, done, text)
            if done == 3:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train_module.ProgressBar, "step", step)

    return set_up


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_a_signal_ends_a_run_with_what_a_shell_or_a_scheduler_wants(train, ask, tmp_path, number):
    ask(number)
    for flag, code in (("", 128 + number), (" --requeue", os.EX_TEMPFAIL)):
        outcome = train(f"vit --out out{code}{flag}")
        assert (outcome.code, outcome.out) == (code, "")
        (line,) = [x for x in outcome.err.splitlines() if x.startswith("warning: ")]
        assert f"warning: {number.name} ended the run at step" in line and "--resume latest" in line
        assert len(list((tmp_path / f"out{code}/checkpoints").iterdir())) == 1
        ask(0)
        assert train(f"vit --out out{code} --resume latest").code == 0
        ask(number)


def test_a_damaged_checkpoint_gives_way_and_is_named(train, tmp_path):
    train("vit --out out --save-every 4")
    (tmp_path / "out/checkpoints/step-00000006/model.safetensors").write_bytes(b"")
    outcome = train("vit --out out --save-every 4 --resume latest")
    assert (outcome.code, outcome.out) == (0, "trained 2 steps in 3 blocks: out\n")
    (line,) = [x for x in outcome.err.splitlines() if x.startswith("warning: ")]
    assert "step-00000006: model.safetensors: expected bytes" in line and "passed over" in line


def test_weights_that_are_not_finite_are_refused_and_the_last_checkpoint_stays(train, tmp_path):
    outcome = train("vit --out out --lr 1e39 --num-blocks 1 --steps 1")
    assert outcome.code == 1 and not list((tmp_path / "out/checkpoints").iterdir())
    assert outcome.err.splitlines()[-1].startswith("error: weights must be finite to be saved, got")


def test_as_many_checkpoints_are_kept_as_were_asked_for(train, tmp_path):
    train("vit --out out --save-every 1 --keep 4")
    kept = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (3, 4, 5, 6)]


def stray_file(out):
    (out / "checkpoints/step-00000002").write_text("mine")


def stray_link(out):
    (out / "checkpoints/step-00000002").symlink_to("nothing")


def no_directory(out):
    (out / "checkpoints").rmdir()
    (out / "checkpoints").write_text("mine")


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        (stray_file, "step-00000002 must be the directory of a checkpoint, got a file"),
        (stray_link, "step-00000002 must be the directory of a checkpoint, got a link"),
        (no_directory, "Not a directory: out/checkpoints"),
    ],
)
def test_what_stops_every_save_is_said_before_the_first_step(train, tmp_path, stray, message):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    stray(tmp_path / "out")
    before = read_tree(tmp_path)
    assert refused(train("vit --out out"), message)
    assert read_tree(tmp_path) == before


def test_more_steps_other_data_and_a_log_without_a_checkpoint(train, tmp_path):
    train("vit --out out")
    longer = train("vit --out out --steps 3 --resume latest")
    assert (longer.code, longer.out) == (0, "trained 3 steps in 3 blocks: out\n")
    data = dict(np.load(tmp_path / "data.npz"))
    data["images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "data.npz", **data)
    other = train("vit --out out --steps 4 --resume latest")
    assert refused(other, "error: data must be that of checkpoint out/checkpoints/step-00000009: d")
    told = train("vit --out out --steps 4 --resume latest --data-changed ok")
    assert told.code == 0 and "warning: data was " in told.err
    for path in (tmp_path / "out/checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    again = train("vit --out out")
    assert again.code == 0 and "warning: out/log.jsonl is that of a run without a" in again.err
    assert len((tmp_path / "out/log-1.jsonl").read_text().splitlines()) == 12


def test_ctrl_c_while_the_program_is_imported_is_no_traceback(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "dbkernels", "doctor"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        end = time.monotonic() + 60
        while "libtorch_cpu" not in Path(f"/proc/{program.pid}/maps").read_text():
            assert program.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (130, "", "")
