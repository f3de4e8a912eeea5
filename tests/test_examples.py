"""Every example runs, at a small size; commands of the pages that name one are these."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, **settings):
        runpy.run_path(str(EXAMPLES / name))["main"](**settings)
        return capsys.readouterr().out

    return run


def test_a_flow_is_trained_in_blocks_and_draws_digits(run, tmp_path):
    lines = run("flow.py", steps=2).splitlines()
    assert lines[0].endswith("t from 0.606 to 1.000") and lines[-1].startswith("wrote 80 digits")
    assert Image.open(tmp_path / "digits.png").size == (8 * 64, 10 * 64)


def test_adapters_of_two_blocks_are_trained_apart_and_merge(run, tmp_path):
    lines = run("lora_blocks.py", steps=1, rank=2).splitlines()
    assert [line[:7] for line in lines[:2]] == ["block 0", "block 1"]
    assert lines[2].startswith("wrote adapters: 72 adapters of rank 2")
    assert (tmp_path / "adapters/adapter_config.json").exists()


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in text, path.name
