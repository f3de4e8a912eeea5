"""What text models are compared by: runs are trained once, and rows tell their bits over seeds."""

import json
import math

import numpy as np
import pytest
import tyro

from dbkernels.cli.train import Train
from dbkernels.data.token_files import write_tokens

SMALL = "--dim 8 --num-heads 2 --length 8"
FEW = "--batch-size 2 --lr 1e-3"


@pytest.fixture
def text(bench, tmp_path, monkeypatch):
    """Runs the benchmark on a few tokens, with small models; gives the rows and the runs."""
    random = np.random.default_rng(0)
    splits = {name: [random.integers(27, size=64)] for name in ("train", "test")}
    write_tokens(tmp_path / "tokens", splits, vocabulary=27)
    module = bench("text")
    monkeypatch.setattr(module, "SIZES", SMALL)
    monkeypatch.setattr(module, "RATE", FEW)

    def run(**options):
        told = {"seeds": 2, "updates": 1, "out": tmp_path / "rows.jsonl", **options}
        module.Text(tmp_path / "tokens", tmp_path / "runs", **told).run()
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        return rows, sorted((tmp_path / "runs").iterdir())

    return run


def test_a_row_is_a_competitor_over_seeds_and_a_run_is_trained_once(text):
    rows, runs = text(only="mdm 3")
    assert [(row["competitor"], row["num_blocks"], row["depth"]) for row in rows] == [
        ("3 blocks", 3, 6)
    ]
    assert len(runs) == 2
    for row in rows:
        assert row["seeds"] == 2 and len(row["blocks"]) == row["num_blocks"]
        # hardly trained at all
        assert row["bits"] == [pytest.approx(math.log2(27), abs=0.6)]
    before = [(run / "log.jsonl").read_bytes() for run in runs]
    assert text(only="mdm 3") == (rows, runs)
    assert [(run / "log.jsonl").read_bytes() for run in runs] == before


def test_every_competitor_is_a_run_that_can_be_made(text, bench, tmp_path):
    module = bench("text")
    program = module.Text(tmp_path / "tokens", tmp_path / "runs")
    for family, name in module.COMPETITORS:
        flags = [*program.flags(family, name), "--data", str(program.data), "--out", "run"]
        config = tyro.cli(Train, args=flags, config=(tyro.conf.OmitArgPrefixes,)).config()
        steps = 4750 if name == "one pass, as much arithmetic" else 1500
        assert (config.family, config.model.length, config.trainer.steps) == (family, 8, steps)
        assert config.build("cpu").text


@pytest.mark.parametrize(
    ("only", "of_noise"),
    [("huginn conv", set()), ("huginn one pass, as", {"least", "most_noise", "sampler"})],
)
def test_figures_tell_the_bound_of_noise_and_the_exact_bits_without(only, of_noise, text, bench):
    [row], _ = text(only=only, seeds=1, windows=3)
    every = set(bench("text").FIGURES.values())
    assert every & row.keys() == {"bits", "blocks"} | of_noise
    assert row["windows"] == 3 and all(len(row[name]) == 1 for name in every & row.keys())


def test_rejects(text):
    with pytest.raises(ValueError, match=r"only must begin one of mdm end to end, .*, got gpt"):
        text(only="gpt")
