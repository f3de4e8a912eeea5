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


@pytest.mark.parametrize(
    ("study", "called", "updates", "flags"),  # those behind the setting's own
    [
        ("families", "vit end to end", 300, "--num-blocks 1 --sigma-min 79"),
        ("families", "vit end to end, as deep as a block", 300,
         "--num-blocks 1 --sigma-min 79 --depth 4"),
        ("families", "vit 3 blocks, the paper's prior", 300, "--num-blocks 3 --gamma 0.05 --paper"),
        ("families", "dit end to end", 600, "--num-blocks 1"),
        ("families", "ar end to end", 800, "--num-blocks 1 --objective conventional"),
        ("families", "ar 3 blocks, the paper's", 800,
         "--num-blocks 3 --gamma 0.1 --paper --next-token-weight 0"),
        ("families", "ar 3 blocks, recommended", 800,
         "--num-blocks 3 --gamma 0.1 --mean -0.55 --std 0.8 --sigma-max 8 "
         "--clean through --noise-order deepest --read-out posterior"),
        ("huginn", "huginn recurrent", 400, "--num-blocks 1 --objective conventional"),
        ("huginn", "huginn one pass, as many updates", 400,
         "--num-blocks 1 --mean -0.55 --std 0.8 --sigma-max 8"),
        ("huginn", "huginn one pass, as much arithmetic", 1333,
         "--num-blocks 1 --mean -0.55 --std 0.8 --sigma-max 8"),
        ("blocks", "dit 1 block, a third of the layers", 600, "--num-blocks 1 --depth 4"),
        ("blocks", "dit 1 block, a third of the updates", 200, "--num-blocks 1"),
        ("partition", "dit equal probability, [4, 4, 4]", 600, "--num-blocks 3 --gamma 0"),
        ("partition", "dit linear, [2, 4, 6]", 600,
         "--num-blocks 3 --gamma 0 --scheme linear --split 2,4,6"),
        ("partition", "dit log uniform, [6, 4, 2]", 600,
         "--num-blocks 3 --gamma 0 --scheme log_uniform --split 6,4,2"),
        ("partition", "ar linear of the paper's prior", 800,
         "--num-blocks 3 --gamma 0 --next-token-weight 0 --paper --scheme linear"),
        ("partition", "ar equal information", 800,
         "--num-blocks 3 --gamma 0 --next-token-weight 0 --mean -0.55 --std 0.8 --sigma-max 8"),
        ("overlap", "dit overlap 0.1", 600, "--num-blocks 3 --gamma 0.1"),
        ("weighting", "vit none", 300, "--num-blocks 3 --gamma 0.05"),
        ("weighting", "vit that of the process", 300,
         "--num-blocks 3 --gamma 0.05 --weighting process"),
        ("weighting", "dit the same, of mean 1 in a block", 600,
         "--num-blocks 3 --gamma 0.05 --weighting normalised"),
        ("weighting", "dit the published code's", 600,
         "--num-blocks 3 --gamma 0.05 --weighting published"),
        ("baselines", "vit forward-forward, ViT", 300, "--lr 4e-3"),
        ("baselines", "vit contrastive forward-forward, ViT", 300, "--order sequential"),
        ("baselines", "vit greedy, ViT", 300, ""),
    ],
)  # fmt: skip
def test_an_arm_is_trained_as_it_is_called(study, called, updates, flags, bench):
    first = {name: of[0] for name, of in bench("studies.scales").SETTINGS["tiny"].items()}
    [arm] = [
        arm
        for arm in bench("studies").STUDIES[study].arms("tiny")
        if (f"{arm.family} {arm.name}", arm.data) == (called, first[arm.family].data)
    ]
    own = first[arm.family]
    assert arm.flags == f"--depth {own.depth} {own.flags} {flags}".strip()
    assert arm.updates == updates


@pytest.mark.parametrize(("scale", "updates"), [("small", 33_333), ("paper", 650_000)])
def test_one_pass_has_as_many_updates_as_its_arithmetic_allows(scale, updates, bench):
    arms = {arm.name: arm.updates for arm in bench("studies").STUDIES["huginn"].arms(scale)}
    assert arms["one pass, as much arithmetic"] == updates


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
