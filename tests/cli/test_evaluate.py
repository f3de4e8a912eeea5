import statistics

import pytest
from cli.runs import rows_of


@pytest.mark.parametrize("levels", [2, 4])
def test_json_has_an_accuracy_for_every_level(cli, runs, levels):
    run = runs("vit")
    (row,) = rows_of(cli(f"evaluate {run} --json --levels {levels} --device cpu"))
    assert len(row["accuracy"]) == len(row["cross_entropy"]) == len(row["levels"]) == levels
    for name in ("accuracy", "confidence", "calibration_error"):
        assert len(row[name]) == levels and all(0 <= share <= 1 for share in row[name])
    assert len(row["block_losses"]) == row["num_blocks"] == 3
    assert (row["run"], row["family"], row["seed"]) == (str(run), "vit", 0)


def test_a_dit_has_losses_and_no_accuracy(cli, runs):
    (row,) = rows_of(cli(f"evaluate {runs('dit')} --json"))
    assert len(row["block_losses"]) == 3 and row["loss_at_sigma_max"] > 0
    assert "accuracy" not in row and "accuracy" not in cli(f"evaluate {runs('dit')}").out


def test_three_seeds_have_a_mean_and_a_spread_and_another_setting_has_not(cli, runs, monkeypatch):
    lines = ("vit", "vit --seed 1", "vit --seed 2", "vit --lr 0.1")
    names = [runs(line).name for line in lines]
    monkeypatch.chdir(runs("vit").parent)
    rows = rows_of(cli(f"evaluate {' '.join(names)} --json"))
    lines = cli(f"evaluate {' '.join(names)}").out.splitlines()
    begun = [line.split()[0] for line in lines if line and line[0] not in " ─"]
    assert begun == 2 * ["run", *names, "mean", "spread"]
    assert lines[-2].startswith("mean of 3 seeds")
    ways = ((statistics.fmean, ".4g"), (statistics.stdev, ".1g"))
    # a table of losses, and one of answers
    for losses, answers, (of, digits) in zip(lines[7:9], lines[-2:], ways, strict=True):
        assert (
            losses.split()[-1] == f"{of([row['loss_at_sigma_max'] for row in rows[:3]]):{digits}}"
        )
        for name, place in (("accuracy", -4), ("calibration_error", -1)):
            expected = 100 * of([row[name][-1] for row in rows[:3]])
            assert answers.split()[place] == f"{expected:.2f}"


def test_single_starts_have_a_mean_and_a_spread_beside_their_averaged_probabilities(
    cli, runs, monkeypatch
):
    names = [runs(line).name for line in ("vit --lr 0.1", "vit --lr 0.1 --seed 1")]
    monkeypatch.chdir(runs("vit").parent)
    how = "--start noise --starts 4 --levels 2"
    rows = rows_of(cli(f"evaluate {' '.join(names)} {how} --json"))
    for row in rows:
        assert len(row["accuracy"]) == 2 and len(single := row["accuracy_of_starts"]) == 4
        assert row["accuracy_of_one_start"] == pytest.approx(statistics.fmean(single))
        assert row["accuracy_of_one_start_spread"] == pytest.approx(statistics.stdev(single))
    lines = cli(f"evaluate {' '.join(names)} {how}").out.splitlines()
    means, spreads = (
        [row[f"accuracy_of_one_start{end}"] for row in rows] for end in ("", "_spread")
    )
    for line, figures in zip(lines[-4:-2], zip(means, spreads, strict=True), strict=True):
        assert line.rstrip().endswith("  " + " ± ".join(f"{100 * x:.2f}" for x in figures))
    mean = f"{50 * sum(means):.2f} ± {50 * sum(spreads):.2f}"
    assert lines[-2].rstrip().endswith(f"  {mean}")
    (row,) = rows_of(cli(f"evaluate {names[0]} --start noise --starts 1 --json"))
    assert not [name for name in row if "start" in name]
    assert "one start" not in cli(f"evaluate {names[0]} --start noise").out


def test_a_classifier_answers_from_zero_unless_it_is_told_otherwise(cli, runs):
    run = runs("vit --lr 0.1")
    ways = ("", "--start zero", "--start noise", "--start noise --starts 4")
    own, zero, noise, several = (
        rows_of(cli(f"evaluate {run} --json {way}"))[0]["cross_entropy"] for way in ways
    )
    assert own == zero and len({tuple(each) for each in (zero, noise, several)}) == 3


def test_long_directories_leave_the_figures_on_one_line(cli, runs, tmp_path):
    parent = "a_directory_with_a_long_name/and_another_one_inside_of_it/and_a_third_one"
    (tmp_path / parent).mkdir(parents=True)
    for seed, line in enumerate(("vit", "vit --seed 1")):
        (tmp_path / parent / f"seed{seed}").symlink_to(runs(line))
    lines = cli(f"evaluate {parent}/seed0 {parent}/seed1").out.splitlines()
    assert max(map(len, lines)) <= 80
    begun = [
        line.split()[0] for line in lines if line.startswith(("run ", "seed", "mean", "spread"))
    ]
    # a table of losses, and one of answers
    assert begun == 2 * ["run", "seed0", "seed1", "mean", "spread"]
    assert parent in lines[-1]


def test_runs_of_different_places_keep_their_names(cli, runs, tmp_path):
    (tmp_path / "here").symlink_to(runs("vit"))
    out = cli(f"evaluate here {runs('vit --lr 0.1')}").out
    assert "here" in out and "runs of" not in out


@pytest.mark.parametrize("flag", ["--weights last", "--split train", "--seed 3"])
def test_weights_split_and_seed_change_the_losses(cli, runs, flag):
    run = runs("vit --lr 0.1 --ema 0.9")
    (row,), (other,) = (rows_of(cli(f"evaluate {run} --json {more}")) for more in ("", flag))
    assert row["loss_at_sigma_max"] != other["loss_at_sigma_max"]
