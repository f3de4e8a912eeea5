import json
import statistics

import pytest
from cli.runs import refused, write_npz


def rows_of(outcome):
    assert outcome.code == 0, outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.parametrize("levels", [2, 4])
def test_json_has_an_accuracy_for_every_level(cli, trained, levels):
    trained("vit", "out")
    (row,) = rows_of(cli("evaluate", "out", "--json", "--levels", levels, "--device", "cpu"))
    assert len(row["accuracy"]) == len(row["cross_entropy"]) == len(row["levels"]) == levels
    assert all(0 <= share <= 1 for share in row["accuracy"])
    assert len(row["block_losses"]) == row["num_blocks"] == 3
    assert (row["run"], row["family"], row["seed"]) == ("out", "vit", 0)


def test_a_dit_has_losses_and_no_accuracy(cli, trained):
    trained("dit", "out")
    (row,) = rows_of(cli("evaluate", "out", "--json"))
    assert len(row["block_losses"]) == 3 and row["loss_at_sigma_max"] > 0
    assert "accuracy" not in row
    assert "accuracy" not in cli("evaluate", "out").out


def test_three_seeds_are_averaged_and_another_setting_is_not(cli, trained):
    for seed in range(3):
        trained("vit", f"seed{seed}", "--seed", seed)
    trained("vit", "other", "--lr", "0.1")
    names = ["seed0", "seed1", "seed2", "other"]
    rows = rows_of(cli("evaluate", *names, "--json"))
    lines = cli("evaluate", *names).out.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == [*names, "mean"]
    assert lines[-1].startswith("mean of 3 seeds")
    mean = statistics.fmean(row["loss_at_sigma_max"] for row in rows[:3])
    accuracy = statistics.fmean(row["accuracy"][-1] for row in rows[:3])
    assert f"{mean:.4g}" in lines[-1].split()
    assert lines[-1].split()[-1] == f"{100 * accuracy:.2f}"


def test_long_directories_leave_the_figures_on_one_line(cli, trained):
    parent = "a_directory_with_a_long_name/and_another_one_inside_of_it/and_a_third_one"
    for seed in range(2):
        trained("vit", f"{parent}/seed{seed}", "--seed", seed)
    lines = cli("evaluate", f"{parent}/seed0", f"{parent}/seed1").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[3:6]] == ["seed0", "seed1", "mean"]
    assert parent in lines[-1]


def test_runs_of_different_places_keep_their_names(cli, trained, tmp_path):
    trained("vit", "here")
    trained("vit", tmp_path / "far", "--lr", "0.1")
    out = cli("evaluate", "here", tmp_path / "far").out
    assert "here" in out
    assert "runs of" not in out


def test_last_weights_differ_from_their_average(cli, trained):
    trained("vit", "out", "--ema", "0.9", "--lr", "0.1")
    (average,) = rows_of(cli("evaluate", "out", "--json"))
    (last,) = rows_of(cli("evaluate", "out", "--json", "--weights", "last"))
    assert average["loss_at_sigma_max"] != last["loss_at_sigma_max"]


def test_reads_the_split_that_is_asked_for(cli, trained):
    trained("vit", "out", "--lr", "0.1")
    (test,) = rows_of(cli("evaluate", "out", "--json"))
    (train,) = rows_of(cli("evaluate", "out", "--json", "--split", "train"))
    assert test["loss_at_sigma_max"] != train["loss_at_sigma_max"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "run_dirs must name at least one run, got none"),
        ("out out", "run_dirs must name each run once, got out twice"),
        ("nope", "a run's directory must hold config.json, got none in nope"),
        ("out --levels 1", "a grid needs at least 2 levels, got 1"),
        ("out --checkpoint nope", "nope is not a checkpoint"),
        (
            "out --data colour.npz",
            "images must be (1, 8, 8), as the run was trained, got (3, 8, 8)",
        ),
        ("out --data nope", "data source nope does not exist"),
        ("out --device tpu", "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_rejects(cli, trained, tmp_path, arguments, message):
    trained("vit", "out")
    write_npz(tmp_path / "colour.npz", (3, 8, 8))
    assert refused(cli("evaluate", *arguments.split()), message)
