"""Runs of the command line whose samples other processes read."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli.runs import SIZES, read_tree, refused
from PIL import Image

from dbkernels.cli import train as train_module
from dbkernels.training import checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def make_photos(root, count=8):
    """A folder of a class of dark JPEGs and one of bright ones."""
    for label, low in (("dark", 0), ("light", 128)):
        (root / label).mkdir(parents=True)
        for index in range(count):
            random = np.random.default_rng(index + low)
            pixels = random.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.jpg")


def checkpoints(directory):
    """The weights and all else of every checkpoint."""
    found = {}
    for path in sorted((directory / "checkpoints").iterdir()):
        tensors, state = checkpoint.load(path)
        found[path.name] = (
            {
                f"{group}.{name}": tensor.tolist()
                for group, each in tensors.items()
                for name, tensor in each.items()
            },
            state["counters"],
        )
    return found


@pytest.mark.parametrize("data", ["data.npz", "photos"])
def test_workers_are_no_part_of_a_run(cli, tmp_path, data):
    make_photos(tmp_path / "photos")
    flags = f"--data {data} --patch 4 --save-every 4 --keep 9 {' '.join(SIZES)}"
    for workers in (0, 2):
        outcome = cli(f"train vit --out out{workers} {flags} --workers {workers}")
        assert outcome.code == 0, outcome
    plain, other = (tmp_path / f"out{workers}" for workers in (0, 2))
    assert (plain / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert checkpoints(plain) == checkpoints(other)
    assert not multiprocessing.active_children()
    # and who goes on may have another number
    for path in (other / "checkpoints/step-00000006").iterdir():
        path.unlink()
    (other / "checkpoints/step-00000006").rmdir()
    outcome = cli(f"train vit --out out2 {flags} --resume latest --workers 1")
    assert outcome.code == 0 and "bits from here on" not in outcome.err
    assert checkpoints(plain) == checkpoints(other)


def test_a_broken_image_ends_a_run_in_one_sentence_and_what_was_trained_is_saved(cli, tmp_path):
    make_photos(tmp_path / "photos", count=32)
    broken = tmp_path / "photos/dark/31.jpg"
    broken.write_bytes(broken.read_bytes()[:-40])  # the header is whole
    steps = [*SIZES[:3], "--steps=9", *SIZES[4:]]
    outcome = cli(f"train vit --out out --data photos --patch 4 --workers 2 {' '.join(steps)}")
    assert outcome.code == 1 and outcome.err.splitlines()[-1].startswith("error: ")
    assert "31.jpg cannot be decoded" in outcome.err and "Traceback" not in outcome.err
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_ends_a_run_in_one_sentence(train, monkeypatch, tmp_path):
    inner = train_module.ProgressBar.step

    def step(bar, done, text=""):
        inner(bar, done, text)
        if done == 3:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(train_module.ProgressBar, "step", step)
    outcome = train("vit --out out --workers 2 --steps 20")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "error: workers must live as long as the run reads, got one that" in outcome.err
    (saved,) = (tmp_path / "out/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) >= 3
    assert train("vit --out out --workers 2 --steps 20 --resume latest").code == 0


def test_a_number_that_cannot_be_is_refused(train):
    assert refused(train("vit --out out --workers -1"), "workers must be at least 0, got -1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_all_processes_of_a_run_ends_it_as_one_to_the_run_alone(number, tmp_path, cli):
    flags = [*SIZES, "--steps=100000", "--out=out", "--data=data.npz", "--workers=2", "--requeue"]
    command = [sys.executable, "-m", "dbkernels", "train", "vit", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    log, deadline = tmp_path / "out/log.jsonl", time.time() + 60
    while time.time() < deadline and not (log.exists() and len(log.read_bytes().splitlines()) > 3):
        time.sleep(0.1)
    os.killpg(run.pid, number)
    said = run.communicate(timeout=60)[1].decode()
    assert run.returncode == os.EX_TEMPFAIL, said
    assert f"{number.name} ended the run at step" in said and "Traceback" not in said
    assert len(read_tree(tmp_path / "out/checkpoints")) == 3
    assert all(json.loads(line)["loss"] for line in log.read_text().splitlines())
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
