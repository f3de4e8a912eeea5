"""How classifiers answer: rows over seeds, in each way of a start."""

import json
import statistics

import pytest
from cli.runs import SIZES, write_npz

from dbkernels import open_data
from dbkernels.cli.main import main
from dbkernels.training.run import load_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs that differ by their seed, and one with another least level."""
    root = tmp_path_factory.mktemp("answers")
    write_npz(root / "made.npz")
    for name, flags in {"a": "--seed 0", "b": "--seed 1", "c": "--sigma-min 0.1"}.items():
        run = ["train", "vit", "--data", str(root / "made.npz"), "--out", str(root / name)]
        main([*run, *SIZES, "--lr", "0.1", *flags.split()])
    return root


@pytest.fixture
def answer(bench, made, monkeypatch, capsys):
    def run(*names):
        out = made / "rows.jsonl"
        bench("answers").Answers(tuple(made / name for name in names), out).run()
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    return run


def test_a_row_is_the_runs_that_differ_by_their_seed_alone(answer, made):
    rows, shown = answer("a", "b", "c")
    assert [(row["seeds"], row["least"], row["data"]) for row in rows] == [
        (2, 0.4, "made"),
        (1, 0.1, "made"),
    ]
    assert {(row["updates"], row["batch"], row["num_blocks"]) for row in rows} == {(2, 8, 3)}
    for row in rows:
        for name in ("accuracy", "accuracy_from_noise", "accuracy_of_six"):
            assert len(row[name]) == len(row[f"{name}_spread"]) == 3
    assert "made, 2 updates of batches of 8" in shown and "mean of six starts" in shown
    assert str(made) in rows[0]["command"]


def test_each_way_is_what_an_evaluation_says(answer, made):

    [row], _ = answer("a")
    _, blocks = load_run(made / "a", which="latest", averaged=True, device="cpu")
    test = open_data(str(made / "made.npz"), "test")
    ways = {
        "accuracy": {},
        "accuracy_from_noise": {"start": "noise"},
        "accuracy_of_six": {"start": "noise", "starts": 6},
    }
    for name, way in ways.items():
        assert row[name] == pytest.approx(blocks.evaluate(test, **way).metrics["accuracy"])


def test_lists_over_seeds_have_a_mean_and_a_standard_deviation(bench):
    rows = [{"a": [0.1, 0.5], "b": 3}, {"a": [0.3, 0.7], "b": 4}, {"a": [0.8, 0.6], "b": 5}]
    row = bench("seeds").over_seeds(rows, ("a", "c"))
    assert (row["b"], row["seeds"]) == (3, 3) and "c" not in row
    assert row["a"] == pytest.approx([0.4, 0.6])
    assert row["a_spread"] == pytest.approx([statistics.stdev([0.1, 0.3, 0.8]), 0.1])
    assert bench("seeds").over_seeds(rows[:1], ("a",))["a_spread"] == [0.0, 0.0]


def test_a_directory_without_a_run_is_one_sentence(bench, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="must hold config\\.json, got none in"):
        bench("answers").Answers((tmp_path,)).run()
