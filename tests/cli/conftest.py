from dataclasses import replace
from functools import cache

import pytest
from cli.runs import SIZES, Outcome, write_npz

from dbkernels.cli.main import main
from dbkernels.models import vit


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


@pytest.fixture(scope="module")
def shallow():
    """Gives the ViT of the digits four layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.PRESETS, "digits", replace(vit.PRESETS["digits"], depth=4))
        yield


@pytest.fixture
def train(cli):
    """Trains a tiny run: a family and flags, such as --out."""
    return lambda line: cli(f"train --data data.npz {' '.join(SIZES)} {line}")


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
