"""`plan --quality`, and the command that it gives."""

import shutil
from math import log
from pathlib import Path

import pytest
from cli.runs import refused, rows_of, write_npz
from planning.reckoned import reckoned

from dbkernels.cli.plan_quality import NEAR, ranked
from dbkernels.cli.train_command import train_command
from dbkernels.data.token_files import write_tokens
from dbkernels.planning import search
from dbkernels.planning.quality import predicted, read_curves
from dbkernels.training.run_config import read_config

DEEP, SHALLOW, LONGER = (
    f"vit --num-blocks 1 {flags}"
    for flags in ("--depth 4", "--depth 2", "--depth 4 --steps 4 --seed 1")
)


@pytest.fixture
def asked(cli, runs, monkeypatch):
    """What `plan --quality` says of runs by their flags; more may follow."""
    monkeypatch.setattr(search, "estimate", reckoned)

    def ask(*lines, more=""):
        return cli(f"plan {more} --target cpu --quality {' '.join(str(runs(x)) for x in lines)}")

    return ask


def test_runs_say_which_partition_to_train_and_by_which_command(asked, cli):
    law, best, *others = rows_of(asked(DEEP, SHALLOW, LONGER, more="--json"))
    assert (law["depth"], law["steps"], law["batch"], law["memory"]) == (4, 4, 8, None)
    assert law["depth_measured"] and law["samples_measured"]
    assert len(law["runs"]) == 3 and len(law["curve"]) == 24
    rows = [best, *others]
    splits = {tuple(row["split"]) for row in rows}
    assert splits == {(4,), (2, 2), (3, 1), (1, 3), (1, 1, 1, 1)}
    assert {row["scheme"] for row in rows} >= {"equal_probability", "log_uniform", "equal_loss"}
    losses = [row["loss"] for row in others]
    assert losses == pytest.approx(sorted(losses), rel=1e-3)
    near = [row for row in rows if row["loss"] <= (1 + NEAR) * min(losses)]
    assert best["peak_reserved_bytes"] == min(row["peak_reserved_bytes"] for row in near)
    for row in rows:
        times = {each["relative_time"] for each in rows if each["num_blocks"] == row["num_blocks"]}
        assert len(times) == 1 and len(row["block_losses"]) == row["num_blocks"]
    fitted = next(row for row in rows if row["scheme"] == "equal_loss" and row["num_blocks"] == 4)
    for row, out in ((best, "best"), (fitted, "fitted")):
        command = row["command"].removeprefix("python -m dbkernels ").replace("OUT", out)
        assert cli(command).code == 0
        config = read_config(Path(out))
        assert (config.partition.num_blocks, config.trainer.steps) == (row["num_blocks"], 4)
        blocks = config.partition.cut(4, config.prior)
        assert [[block.noise.low, block.noise.high] for block in blocks] == row["levels"]
        (found,) = predicted([Path(run) for run in law["runs"]], [config])
        assert found.loss == pytest.approx(row["loss"])
        assert list(found.block_losses) == pytest.approx(row["block_losses"])


def test_the_screen_has_80_columns_and_says_what_is_a_guess(asked):
    found = asked(DEEP)
    said, _, _ = found.out.partition("To train")
    assert found.code == 0 and max(map(len, said.splitlines())) <= 80
    said = " ".join(found.out.split())
    assert "vit of 4 layers, 2 updates of each, batch 8, on cpu by 1 run in one block" in said
    assert "a guess until a run of other depth is given" in said
    assert "a guess until a run of other steps is given" in said
    assert "train vit" in said and "--out OUT" in said
    both = " ".join(asked(DEEP, SHALLOW, LONGER).out.split())
    assert "a guess" not in both and both.count("as the runs show") == 2


def test_the_recommended_way_needs_least_of_those_that_are_about_as_good():
    def row(name, loss, peak, *to_learn):
        return {"name": name, "loss": loss, "peak_reserved_bytes": peak, "to_learn": to_learn}

    rows = [
        row("far", 1 + 1.1 * NEAR, 1, 0.5, 0.5),
        row("idle", 1 + NEAR / 2, 2, 0.97, 0.03),
        row("busy", 1 + NEAR / 2, 2, 0.6, 0.4),
        row("best", 1.0, 3, 1.0),
        row("near", 1 + 0.9 * NEAR, 4, 1.0),
    ]
    assert [each["name"] for each in ranked(rows)] == ["busy", "best", "idle", "near", "far"]
    assert ranked(rows[:1]) == rows[:1]


def test_a_memory_leaves_out_what_does_not_fit(asked):
    every = rows_of(asked(DEEP, more="--json"))[1:]
    peaks = sorted({row["peak_reserved_bytes"] for row in every})
    limit = f"--memory {peaks[1] / 2**20}MiB"
    _, *rows = rows_of(asked(DEEP, more=f"{limit} --json"))
    assert {row["peak_reserved_bytes"] for row in rows} == set(peaks[:2])
    assert f"on cpu with {peaks[1] / 2**20:.0f}" in asked(DEEP, more=limit).out.replace(" MiB", "")
    assert refused(asked(DEEP, more="--memory 1MiB"), "memory must be at least ")


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (["vit --num-blocks 3"], "", "must be trained in one block, got 3"),
        ([DEEP, "vit --num-blocks 1 --dim 32"], "", "must differ from "),
        ([DEEP, "vit --num-blocks 1 --dim 32"], "", "seed alone, got another model dim"),
        ([DEEP, "vit --num-blocks 1 --lr 1"], "", "seed alone, got another trainer lr"),
        ([DEEP, "dit --num-blocks 1"], "", "seed alone, got another family, "),
        ([LONGER, SHALLOW], "", "or in steps at the same depth, got depth and steps 4 and 4, 2 "),
        ([DEEP], "--batch 4", "batch must be left out with quality, which takes it from the runs"),
        ([DEEP], "--family vit", "family must be left out with quality"),
        ([DEEP], "--memory 1", "must be a positive number and one of KiB"),
    ],
)
def test_a_mistake_is_one_sentence(asked, lines, more, message):
    assert refused(asked(*lines, more=more), message)


def test_a_run_without_a_checkpoint_is_refused_and_so_is_a_plan_without_memory(cli, runs):
    shutil.copytree(runs(DEEP), "unfinished")
    shutil.rmtree("unfinished/checkpoints")
    assert refused(cli("plan --quality unfinished"), "unfinished must hold a checkpoint, got none")
    assert refused(cli("plan --quality nope"), "must hold config.json, got none in nope")
    assert refused(cli("plan"), "memory must be given where quality is not asked for, got none")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = tmp_path_factory.mktemp("text") / "tokens"
    write_tokens(place, {"train": [list(range(27)) * 9], "test": [[3] * 99]}, vocabulary=27)
    return place


def test_the_loss_of_masked_tokens_is_that_of_their_bound(runs, text):
    run = runs(f"mdm --length 8 --num-blocks 1 --data {text}")
    (curve,) = read_curves([run], device="cpu")
    # at each level it is about what a model that knows nothing needs for a token
    assert curve.mean == pytest.approx(log(27), rel=0.15)
    assert curve.at_most_noise == pytest.approx(log(27), rel=0.05)


@pytest.mark.parametrize("family", ["huginn", "ar --objective conventional"])
def test_a_run_that_is_not_cut_into_blocks_is_refused(cli, runs, text, family):
    sizes = "--depth 3 --dim 16 --num-heads 2 --length 8 --num-blocks 1"
    run = runs(f"{family} {sizes} --data {text}")
    said = "a family that is cut into blocks" if family == "huginn" else "trained on noise"
    assert refused(cli(f"plan --quality {run}"), f"must be {'of ' * (family == 'huginn')}{said}")


@pytest.mark.parametrize(
    "line",
    [
        "vit --num-blocks 3 --split 1,1,1 --mean -0.3 --sigma-min 0.1 --weighting normalised",
        "vit --num-blocks 1 --preset cifar100 --depth 2 --patch 4 --no-optimizer-in-backward",
        "dit --num-blocks 1 --process flow --label-drop 0.1 --mirror --time-shift 2 --ema 0.9",
        "dit --num-blocks 2 --depth 2 --scheme linear --gamma 0 --autocast --decay-on all",
        "ar --clean through --noise-order deepest --num-blocks 3 --next-token-weight 0.5",
        "vit --num-blocks 1 --data large.npz --patch 7 --shift 1",
        "vit --from SOURCE --num-blocks 3 --lora 2 --lora-alpha 3 --distill 0.5",
        "mdm --schedule cosine --num-blocks 3 --stride 4 --recompute mlp",
    ],
)
def test_the_command_of_a_run_trains_the_same_run(cli, runs, text, tmp_path, line):
    if line.startswith(("ar", "mdm")):
        line += f" --length 8 --data {text}"
    if "SOURCE" in line:
        line = line.replace("SOURCE", str(runs("vit --num-blocks 1")))
    if "large.npz" in line:
        write_npz(tmp_path / "large.npz", shape=(3, 28, 28))
        line = line.replace("large.npz", str(tmp_path / "large.npz"))
    config = read_config(runs(line))
    command = train_command(config)
    assert command.startswith("python -m dbkernels train ") and command.endswith(" --out OUT")
    found = cli(f"{command.removeprefix('python -m dbkernels ')} --out again --device cpu")
    assert found.code == 0, found.err
    assert read_config(Path("again")) == config
