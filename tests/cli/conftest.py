from functools import cache

import pytest
import torch
from cli.runs import SIZES, Outcome, write_npz

from dbkernels.cli.main import main


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a line of words in a directory of its own, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "data.npz")

    def run(line):
        code = 0
        capsys.readouterr()
        try:
            main(line.split())
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def train(cli):
    """Trains a tiny run of a family into a directory, "vit out"; more flags may follow."""

    def run(line):
        family, out, flags = [*line.split(" ", 2), ""][:3]
        return cli(" ".join(["train", family, "--out", out, "--data data.npz", *SIZES, flags]))

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of a run of a family with more flags, trained once a module."""
    root = tmp_path_factory.mktemp("runs")
    write_npz(root / "data.npz")

    @cache
    def run(line):
        out, (family, *flags) = root / line.replace(" ", ""), line.split()
        places = f"--out {out} --data {root}/data.npz"
        main(["train", family, *places.split(), *SIZES, *flags])
        return out

    return run
