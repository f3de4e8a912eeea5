"""The paper's comparisons: every arm can be trained, and what cannot run is refused before."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tyro
from checkout_tools import tool
from cli.runs import write_npz

from dbkernels.data import idx

STUDIES = ["families", "more-data", "blocks", "partition", "overlap", "weighting", "sharing"]
STUDIES += ["conditioning", "baselines", "layer-sweep", "huginn", "text", "noise", "conversion"]


def _arrays(path):
    write_npz(path)
    return dict(np.load(path))


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_run_that_can_be_made(name, scale, bench, places, monkeypatch):
    job, studies, made = bench("studies.running").Job, bench("studies").STUDIES, {}
    config = job.config

    def noted(self):
        made[self.arm] = config(self)
        return made[self.arm]

    monkeypatch.setattr(job, "config", noted)
    # whether this machine has room for all of them is another question
    monkeypatch.setattr(bench("study"), "require_fits", lambda *words, **sizes: None)
    arms = studies[name].arms(scale)
    jobs = bench("study").Run(name, 1, scale, places, runs=Path("runs"))._jobs(arms)
    assert [each.arm for each in jobs] == arms and made.keys() == set(arms)
    assert len({(arm.family, arm.data, arm.name) for arm in arms}) == len(arms) > 1
    assert len({arm.folder for arm in arms}) == len(arms)
    for arm, found in made.items():
        assert found.family == arm.family and found.trainer.steps == arm.updates
        assert arm.source is None or made[arm.source].model.depth == found.model.depth
        # of any width the blocks are the same, and what is wide takes long to begin
        thin = replace(found, model=found.model.resized({"dim": 4 * found.model.num_heads}))
        assert arm.baseline or thin.build("meta")


def test_runs_that_differ_in_what_their_figures_depend_on_have_folders_of_their_own(bench):
    arm = bench("studies.arm").Arm("dit", "a", "digits", "--dim 8", 3)
    assert replace(arm, name="b").folder == arm.folder
    others = {"data": "fashion", "flags": "--dim 4", "updates": 4, "guidance": 2.0, "steps": 9}
    others |= {"baseline": ("vit", "greedy"), "source": arm}
    folders = {replace(arm, **{name: value}).folder for name, value in others.items()}
    assert len(folders | {arm.folder}) == len(others) + 1


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_families_and_more_data_have_each_of_the_data_of_a_family_once(scale, bench):
    families = "vit", "dit", "mdm", "ar", "huginn"
    settings = bench("studies.scales").SETTINGS[scale]
    first, others = (
        list(
            dict.fromkeys(
                (arm.family, arm.data) for arm in bench("studies").STUDIES[name].arms(scale)
            )
        )
        for name in ("families", "more-data")
    )
    assert first == [(family, settings[family][0].data) for family in families]
    assert others == [(family, each.data) for family in families for each in settings[family][1:]]
    assert others


def test_every_study_is_checked_and_has_a_title(bench):
    assert list(bench("studies").STUDIES) == STUDIES == list(tool("report_studies").TITLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"only": "gpt"}, "only must begin one of vit digits end to end; .*, got gpt"),
        ({"data": ("digits",)}, "data must be NAME=PATH with a name of .*, got digits$"),
        (
            {"data": ("digits=a", "digits=b")},
            "data must name each place once, got digits=a digits=b",
        ),
        ({"data": ("mnist=there",)}, "data must be NAME=PATH .*, got mnist=there"),
        ({"data": ("shakespeare=",)}, "data must be NAME=PATH .*, got shakespeare$"),
        ({"data": ("digits=none.npz",), "only": "vit digits"}, r"none\.npz"),
        ({"data": (), "only": "mdm"}, r"shakespeare must be .*: `python tools/shakespeare\.py"),
        (
            {"out": Path("none/rows.jsonl")},
            "out must be a file in a directory .*, got none/rows.jsonl",
        ),
        ({"out": Path()}, r"out must be a file in a directory that exists, got \."),
        ({"runs": Path(__file__)}, "runs must be a directory, got the file"),
        ({"data": (), "scale": "paper"}, r"data must name a path for cifar100, got none: --data"),
    ],
)
def test_a_study_is_refused_before_anything_runs(options, message, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        study("families", **options)
    assert str(refused.value).count("\n") == 0 and not (tmp_path / "runs").exists()


def test_data_that_cannot_be_tested_on_are_refused_before_anything_runs(study, tmp_path):
    data = _arrays(tmp_path / "digits.npz")
    np.savez(tmp_path / "one.npz", **{n: data[n] for n in ("images", "labels")})
    with pytest.raises(ValueError, match="test"):
        study("sharing", only="vit", data=(f"digits={tmp_path / 'one.npz'}",))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_a_scale_that_the_machine_has_no_memory_for_is_refused(
    scale, study, bench, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench("fits"), "free_bytes", lambda device: 2**20)
    if scale == "tiny":  # is for any machine
        assert study("sharing", only="vit digits shared")
        return
    message = r"cpu must have .* free to train vit --depth 12 --dim 128 .*, got 1.00 MiB"
    with pytest.raises(ValueError, match=message):
        study("families", scale=scale, only="vit fashion", runs=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_is_not_installed_is_told_with_its_command(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "FASHION", tmp_path / "absent")
    run = bench("study").Run("more-data", data=(), runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="sudo apt install dataset-fashion-mnist"):
        run.run()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["wrong"], ["families", "--scale", "huge"], []])
def test_names_and_scales_are_known(words, bench, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(bench("study").Run, args=words)
    assert capsys.readouterr().err
