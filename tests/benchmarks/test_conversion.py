"""What blocks that start from a trained network are compared by: runs are trained once."""

import json

import numpy as np
import pytest
import tyro
from checkout_tools import tool

from dbkernels.cli.train import Train
from dbkernels.data.token_files import write_tokens
from dbkernels.training.run_config import read_config


@pytest.fixture
def conversion(bench, tmp_path, monkeypatch):
    """Runs the benchmark with small models; gives the rows."""
    random = np.random.default_rng(0)
    splits = {name: [random.integers(27, size=64)] for name in ("train", "test")}
    write_tokens(tmp_path / "tokens", splits, vocabulary=27)
    module = bench("conversion")
    small = "--dim 16 --depth 3 --num-heads 2"
    monkeypatch.setattr(module, "SIZES", {"ar": f"{small} --length 8", "dit": small})
    monkeypatch.setattr(module, "BATCH", {"ar": "--batch-size 2", "dit": "--batch-size 4"})
    monkeypatch.setattr(module, "GUIDANCE", 1.0)
    monkeypatch.setattr(module, "PER_CLASS", 2)
    monkeypatch.setattr(module, "train_classifier", lambda *data, seed: module.DigitClassifier())

    def run(**options):
        told = {"seeds": 1, "updates": 1, "source_updates": (2, 2), "windows": 2, **options}
        told["out"] = tmp_path / "rows.jsonl"
        module.Conversion(tmp_path / "tokens", tmp_path / "runs", **told).run()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("only", "figures"),
    [
        ("ar 3 blocks, distilled, clean", {"bits", "most_noise", "least", "ordinary"}),
        ("ar end to end, trained", {"bits", "ordinary"}),
        ("dit 3 blocks, distilled", {"frechet", "recognised"}),
    ],
)
def test_a_row_is_a_competitor_whose_source_is_trained_first(
    conversion, bench, tmp_path, capsys, only, figures
):
    [row] = conversion(only=only)
    assert figures == row.keys() & set(bench("conversion").FIGURES)
    assert row["source_updates"] == 2 and row["updates"] == 1
    logs = sorted((tmp_path / "runs").glob("*/log.jsonl"))
    assert len(logs) == 2
    [config] = [c for log in logs if (c := read_config(log.parent)).start.source]
    assert config.start.digest and config.start.distill == ("distilled" in only)
    assert "2 before" in capsys.readouterr().out
    before = [log.read_bytes() for log in logs]
    assert conversion(only=only) == [row]
    assert [log.read_bytes() for log in logs] == before
    # and the report has a table of it
    page = tmp_path / "tables.md"
    sources = [str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.html")]
    assert tool("report").main([*sources, "--tables", str(page)]) == 0
    assert f"| {row['competitor']} |" in page.read_text()


def test_every_competitor_is_a_run_that_can_be_made(conversion, bench, tmp_path):
    conversion(only="ar end to end, trained")
    conversion(only="dit end to end, trained")
    module = bench("conversion")
    program = module.Conversion(tmp_path / "tokens", tmp_path / "runs", source_updates=(2, 2))
    for family, name in module.COMPETITORS:
        source = program._directory(family, module.SOURCE, 0)
        data = ["--data", str(program.data)] if family == "ar" else []
        flags = [*program.flags(family, name, str(source)), *data, "--out", "run"]
        asked = tyro.cli(Train, args=flags, config=(tyro.conf.OmitArgPrefixes,))
        config = asked.config(asked.trained())
        assert config.family == family and config.model.depth == 3
        assert bool(config.start.source) == ("--from" in flags)
        assert len(config.build("cpu")) == (3 if "3 blocks" in name else 1)


def test_rejects(conversion):
    with pytest.raises(ValueError, match=r"only must begin one of ar end to end, .*, got gpt"):
        conversion(only="gpt")
