"""What blocks that start from a trained network are compared by: runs are trained once."""

import json

import numpy as np
import pytest
import tyro
from checkout_tools import tool

from dbkernels.cli.train import Train
from dbkernels.data.token_files import write_tokens
from dbkernels.training.run import load_run
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
    monkeypatch.setattr(bench("judge"), "STEPS", 1)

    def run(**options):
        told = {"seeds": 1, "updates": 1, "source_updates": (2, 2), "windows": 2, **options}
        told["out"] = tmp_path / "rows.jsonl"
        module.Conversion(tmp_path / "tokens", tmp_path / "runs", **told).run()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("family", "figures"),
    [
        ("ar", {"bits", "most_noise", "least", "ordinary"}),
        ("dit", {"frechet", "recognised"}),
    ],
)
def test_a_competitor_starts_from_a_source_and_every_one_can_be_made(
    conversion, bench, tmp_path, capsys, family, figures
):
    module, only = bench("conversion"), f"{family} 3 blocks, distilled"
    if family == "ar":
        only += ", clean"
    [row] = conversion(only=only)
    assert figures == row.keys() & set(module.FIGURES)
    assert row["source_updates"] == 2 and row["updates"] == 1
    assert "1 updates of batches of" in (told := capsys.readouterr().out) and "2 before" in told
    logs = sorted((tmp_path / "runs").glob("*/log.jsonl"))
    [config] = [c for log in logs if (c := read_config(log.parent)).start.source]
    assert len(logs) == 2 and config.start.digest and config.start.distill == 1
    before = [log.read_bytes() for log in logs]
    assert conversion(only=only) == [row]
    assert [log.read_bytes() for log in logs] == before
    # the report has a table of it
    page = tmp_path / "tables.md"
    sources = [str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.html")]
    assert tool("report").main([*sources, "--tables", str(page)]) == 0
    assert f"| {row['competitor']} | 1 |" in page.read_text()
    # a source has no bound of noise
    program = module.Conversion(tmp_path / "tokens", tmp_path / "runs", source_updates=(2, 2))
    source = program._directory(family, module.SOURCE, 0)
    if family == "ar":
        assert module._of_text(*load_run(source, device="cpu"), 2).keys() == {"bits", "ordinary"}
    for _, name in (key for key in module.COMPETITORS if key[0] == family):
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
