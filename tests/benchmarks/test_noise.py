"""What generators are compared by on each kind of noise: runs are trained once, and rows tell."""

import json

import pytest
import tyro
from checkout_tools import tool

from dbkernels.cli.train import Train


@pytest.fixture
def noise(bench, tmp_path, monkeypatch):
    """Runs the benchmark with small models; gives the rows."""
    module = bench("noise")
    monkeypatch.setattr(module, "SIZES", "--dim 16 --depth 3 --num-heads 2")
    monkeypatch.setattr(module, "RATE", "--batch-size 4 --label-drop 0.1")
    monkeypatch.setattr(bench("judge"), "STEPS", 1)

    def run(**options):
        told = {"seeds": 1, "updates": 1, "per_class": 2, "levels": 3, **options}
        module.Noise(tmp_path / "runs", out=tmp_path / "rows.jsonl", **told).run()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


def test_a_row_is_a_competitor_over_seeds_and_a_run_is_trained_once(noise, tmp_path, capsys):
    told = {"only": "flow v", "sampler": "dpmpp_2m", "gammas": (0.05, 0.2)}
    rows = noise(**told)
    assert [(row["prediction"], row["num_blocks"], row["gamma"]) for row in rows] == [
        ("velocity", 1, 0), ("velocity", 3, 0.05), ("velocity", 3, 0.2)
    ]  # fmt: skip
    logs = sorted((tmp_path / "runs").glob("*/log.jsonl"))
    before = [log.read_bytes() for log in logs]
    assert len(before) == 3
    for row in rows:
        assert row["seeds"] == 1 and row["frechet"][0] > 0 and 0 <= row["recognised"][0] <= 1
    shown = capsys.readouterr().out
    assert "digits, 1 updates of batches of 4, dpmpp_2m, 3 levels" in shown and "1.00" in shown
    noise(**told)
    assert [log.read_bytes() for log in logs] == before
    # and the report has a table of them
    page = tmp_path / "tables.md"
    sources = [str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.html")]
    assert tool("report").main([*sources, "--tables", str(page)]) == 0
    assert "| flow | velocity | 3 blocks | 0.2 |" in page.read_text()


def test_every_competitor_is_a_run_that_can_be_made(noise, bench, tmp_path):
    module = bench("noise")
    program = module.Noise(tmp_path)
    assert len(module.NOISES) > 5
    for process, prediction in module.NOISES:
        way = module.Way(process, prediction, 3, 0.2)
        flags = [*program.flags(way), "--out", "run"]
        config = tyro.cli(Train, args=flags, config=(tyro.conf.OmitArgPrefixes,)).config()
        assert (config.model.process, config.model.prediction) == (process, prediction)
        assert config.partition.gamma == 0.2 and len(config.build("cpu")) == 3
        assert config.trainer.steps == 1000


def test_rejects(noise):
    with pytest.raises(ValueError, match=r"only must begin one of gaussian edm, .*, got ve"):
        noise(only="ve")
