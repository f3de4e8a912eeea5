import pytest
from cli.runs import SIZES, Outcome, write_npz

from dbkernels.cli.main import main


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs the command line in a directory of its own, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "data.npz")

    def run(*arguments):
        code = 0
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def trained(cli):
    """Trains a tiny run of a family into a directory; more flags may follow."""

    def run(family, out, *flags):
        return cli("train", family, "--out", out, "--data", "data.npz", *SIZES, *flags)

    return run
