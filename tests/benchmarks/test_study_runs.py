"""Studies of small models: rows tell all of a run, and a study that was killed goes on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from cli.runs import write_npz

from dbkernels.cli.progress import ProgressBar


@pytest.mark.parametrize(
    ("family", "figure"),
    [
        ("vit", "accuracy"),
        ("dit", "frechet"),
        ("dit", "frechet_close"),
        ("mdm", "bits"),
        ("ar", "bits"),
        ("huginn", "bits"),
    ],
)
def test_a_row_is_a_run_and_tells_all_of_it(family, figure, study, bench, tmp_path):
    rows = study("families", only=family)
    arms = [arm for arm in bench("studies").STUDIES["families"].arms("tiny")]
    arms = [arm for arm in arms if arm.family == family]
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    for row, arm in zip(rows, arms, strict=True):
        assert (row["suite"], row["study"], row["scale"]) == ("study", "families", "tiny")
        assert np.isfinite(row[figure]).all() and row["seed"] == 0
        assert sum(row["layers"]) == row["config"]["model"]["depth"]
        assert len(row["layers"]) == row["num_blocks"] == row["config"]["partition"]["num_blocks"]
        assert row["updates"] == arm.updates == row["config"]["trainer"]["steps"]
        assert row["train"].startswith(f"dbkernels train {family} --data {arm.data} --depth")
        assert row["command"] == "python benchmarks/study.py families --scale tiny"
    assert str(tmp_path) not in json.dumps(rows) and '"/' not in json.dumps(rows)


def test_figures_of_each_seed_are_in_rows_of_their_own(study):
    rows = study("sharing", only="vit", seeds=2)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("shared", 0), ("shared", 1), ("each its own", 0), ("each its own", 1)
    ]  # fmt: skip
    assert [row["config"]["trainer"]["seed"] for row in rows] == [0, 1, 0, 1]
    assert rows[0]["loss_of_blocks"] != rows[1]["loss_of_blocks"]


def test_processes_find_the_same_rows(study, tmp_path):
    one = study("sharing", only="vit")
    assert study("sharing", only="vit", runs=tmp_path / "others", processes=2) == one


def test_a_study_that_was_killed_ends_with_the_same_rows(study, bench, tmp_path, monkeypatch):
    running = bench("studies.running")
    monkeypatch.setattr(running, "SAVE_EVERY", 2)
    whole = study("sharing", only="vit")
    shown, seen = ProgressBar.step, []

    def killed(self, done, text):
        seen.append(done)
        if len(seen) == 6 + 3:  # in the third step of the second arm
            raise KeyboardInterrupt
        shown(self, done, text)

    runs = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressBar, "step", killed)
        study("sharing", only="vit", runs=runs)
    logs = {path: path.read_bytes() for path in runs.glob("*/log.jsonl")}
    half = [path.parent for path in logs if not (path.parent / "figures.json").exists()]
    assert len(logs) == 2 and len(half) == 1
    [last] = (half[0] / "checkpoints").glob("step-*")
    assert last.name < "step-00000006"
    assert study("sharing", only="vit", runs=runs) == whole
    [first] = set(logs) - {half[0] / "log.jsonl"}
    assert first.read_bytes() == logs[first]
    # what was trained and not measured is measured, and what was measured is not again
    (first.parent / "figures.json").unlink()
    shutil.rmtree(half[0] / "checkpoints")
    assert study("sharing", only="vit", runs=runs) == whole


def test_runs_of_other_data_are_refused(study, tmp_path):
    study("sharing", only="vit digits shared")
    write_npz(tmp_path / "digits.npz", classes=2)
    other = (f"digits={tmp_path / 'digits.npz'}",)
    with pytest.raises(ValueError, match=r"runs must be of the data .*other --runs \(vit, digits,"):
        study("sharing", only="vit digits shared", data=other)
    assert study("sharing", only="vit digits shared", data=other, runs=tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "figures.json must be what was measured, got b'': remove it"),
        ('{"study"', "figures.json must be what was measured"),
        ("3", "figures.json must be what was measured"),
        ("{}", "runs must be of the data"),
        (None, "device must be cuda as for what was measured, got cpu: give other --runs"),
    ],
)
def test_what_is_kept_and_is_not_of_the_run_is_refused(text, message, study, tmp_path):
    [row] = study("sharing", only="vit digits shared")
    [kept] = (tmp_path / "runs").glob("*/figures.json")
    kept.write_text(json.dumps(row | {"driver": "570.86"}) if text is None else text)
    with pytest.raises(ValueError, match=message):
        study("sharing", only="vit digits shared")
    kept.unlink()
    assert study("sharing", only="vit digits shared") == [row]


def test_a_loss_that_is_no_number_is_told_with_its_run(study, bench, monkeypatch):
    settings = bench("studies.scales").SETTINGS["tiny"]
    wild = replace(settings["vit"][0], flags=f"{settings['vit'][0].flags} --lr 1e38")
    monkeypatch.setitem(settings, "vit", [wild])
    with pytest.raises(FloatingPointError, match=r"\(vit, digits, shared, seed 0; its run is "):
        study("sharing", only="vit digits shared")


def test_a_study_that_is_stopped_says_how_it_goes_on(study, bench, monkeypatch, capsys):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench("study").Run, "run", stopped)
    monkeypatch.setattr("sys.argv", ["study.py", "sharing"])
    with pytest.raises(SystemExit) as ended:
        bench("study").main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped: the same command goes on\n"


def test_an_arm_whose_name_begins_another_is_taken_alone(study):
    both = {"3 blocks", "3 blocks, the paper's prior"}
    assert {row["arm"] for row in study("families", only="vit digits 3 b")} == both
    assert [row["arm"] for row in study("families", only="vit digits 3 blocks")] == ["3 blocks"]


def test_studies_share_the_runs_that_they_have_in_common(study, tmp_path):
    study("sharing", only="vit digits shared")
    [run] = (tmp_path / "runs").iterdir()
    before = (run / "log.jsonl").read_bytes()
    row, other = study("families", only="vit digits 3")
    assert (row["study"], row["arm"]) == ("families", "3 blocks")
    assert other["arm"] == "3 blocks, the paper's prior"
    assert len([*(tmp_path / "runs").iterdir()]) == 2
    assert (run / "log.jsonl").read_bytes() == before


def test_blocks_are_cut_at_the_seams_of_the_network_end_to_end(study, bench, monkeypatch):
    module, read = bench("studies.layer_sweep"), []
    sweep = module.sweep

    def noted(blocks, data, **options):
        read.append((options["samples"], len(data)))
        return sweep(blocks, data, **options)

    monkeypatch.setattr(module, "sweep", noted)
    rows = study("layer-sweep")
    assert read == [(8, 9)] * 6  # both curves of three arms
    assert [row["num_blocks"] for row in rows] == [1, 3, 3]
    for row in rows:
        assert set(row["sweeps"]) == {"trajectory", "within"}
        assert len(row["sweeps"]["within"]["r"]) == 5
    isometry = bench("isometry")
    cuts = isometry.seams(rows[0]["sweeps"]["trajectory"]["r"], 3)
    assert rows[2]["layers"] == list(isometry.split_at(cuts, 4))


@pytest.mark.parametrize(
    ("family", "name", "figures"),
    [
        ("ar", "3 blocks, distilled, clean loss", {"bits", "bits_without_noise"}),
        ("dit", "3 blocks, half distilled", {"frechet", "recognised"}),
    ],
)
def test_blocks_start_from_a_source_of_their_own_seed(family, name, figures, study, tmp_path):
    from_nothing = study("families", only=f"{family} ", seeds=2)
    wholes = [row for row in from_nothing if row["arm"] == "end to end"]
    rows = study("conversion", only=f"{family} {wholes[0]['data']} {name}", seeds=2)
    assert len(rows) == 2
    digests = {row["config"]["start"]["digest"] for row in rows}
    assert len(digests) == 2 and "" not in digests
    for row in rows:
        assert figures <= row.keys() and row["updates"] == 1 and row["num_blocks"] == 3
        assert row["config"]["start"]["source"] == "SOURCE" and "--from SOURCE" in row["train"]
        assert row["config"]["model"]["depth"] == 4 and str(tmp_path) not in json.dumps(row)


def test_a_source_is_trained_before_what_starts_from_it(study, tmp_path):
    told = {"only": "dit digits 3 blocks, untrained"}
    [row] = study("conversion", **told)
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(runs) == 2 and row["layers"] == [2, 1, 1]
    # a job that is done does not need it
    [source] = [
        path for path in (tmp_path / "runs").iterdir() if not (path / "figures.json").exists()
    ]
    shutil.rmtree(source)
    assert study("conversion", **told) == [row] and not source.exists()


def test_bits_without_noise_are_those_of_the_source(study):
    source, trained_on, untrained = (
        study("conversion", only=f"ar shakespeare {name}")[0]
        for name in ("end to end", "end to end, trained on", "3 blocks, untrained")
    )
    assert source["bits"] == pytest.approx(source["bits_without_noise"])
    assert untrained["bits_without_noise"] == pytest.approx(source["bits"], abs=1e-4)
    assert trained_on["bits"] == pytest.approx(trained_on["bits_without_noise"])
    assert trained_on["bits"] != source["bits"]


def test_blocks_are_told_what_one_block_predicts(study, bench, monkeypatch):
    monkeypatch.setattr(bench("studies.blocks"), "COUNTS", (1, 2))
    scales = bench("studies.scales")
    thirds = [replace(each, updates=6, depth=6) for each in scales.SETTINGS["tiny"]["vit"]]
    monkeypatch.setitem(scales.SETTINGS["tiny"], "vit", thirds)
    rows = {row["arm"]: row for row in study("blocks", only="vit")}
    shallow, short = "1 block, a third of the layers", "1 block, a third of the updates"
    assert [*rows] == ["1 block", "2 blocks", shallow, short]
    assert (rows[shallow]["layers"], rows[short]["updates"]) == ([2], 2)
    # both blocks serve as much of the noise as the other
    for row in rows.values():
        assert row["mean_loss"] == pytest.approx(np.mean(row["loss_of_blocks"]))
    # what was read to predict is no prediction
    assert [arm for arm, row in rows.items() if "predicted_loss" in row] == ["2 blocks"]
    assert 0.5 < rows["2 blocks"]["predicted_loss"] / rows["2 blocks"]["mean_loss"] < 2
    # without one of the three nothing is known
    [alone] = study("blocks", only="vit digits 2")
    assert not {"mean_loss", "predicted_loss"} & alone.keys()
