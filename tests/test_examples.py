"""Every example runs, at a small size; commands of the pages that name one are these."""

import re
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


def test_a_model_trains_as_before_and_keeps_less_once_it_is_fused(run):
    sizes = {"dim": 24, "heads": 2, "depth": 2, "tokens": 30, "batch": 2, "steps": 2}
    before, *report, after = run("adopt.py", **sizes).splitlines()
    assert report[:2] == ["replaced: 2", "  blocks.0  DiTBlock"]
    (loss, kept), (same_loss, less) = (
        re.search(r"(loss .*), (.*) units", line).groups() for line in (before, after)
    )
    assert loss == same_loss
    assert float(less) < 0.7 * float(kept)


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in text, path.name
