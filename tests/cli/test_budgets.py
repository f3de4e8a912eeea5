import json

import pytest
from cli.runs import refused

import dbkernels.cli.budgets as module
from dbkernels.cli.budgets import Held, held
from dbkernels.memory.budget import Budget

FAST = [
    "--batch",
    "2",
    "--num-blocks",
    "6",
    "--methods",
    "block_fused",
    "--recompute",
    "none,layer",
]
SETTINGS = {
    "family": "vit",
    "preset": "digits",
    "batch": 2,
    "autocast": False,
    "optimizer_in_backward": False,
    "target": "h100",
    "method": "block_fused",
    "num_blocks": 6,
    "recompute": "none",
    "offload": "none",
}


@pytest.fixture
def written(cli, tmp_path):
    """A file of four budgets, and a way to change the first of them."""
    assert cli("profile", *FAST, "--write", "budgets.json").code == 0
    path = tmp_path / "budgets.json"

    def changed(category="temporaries", by=0, **settings):
        rows = json.loads(path.read_text())
        rows[0]["settings"] |= settings
        rows[0]["by_category"][category] += by
        rows[0]["peak_allocated_bytes"] += by
        path.write_text(json.dumps(rows))
        return rows

    return changed


def test_what_profile_writes_it_holds(cli, written):
    rows = written()
    assert [row["settings"]["recompute"] for row in rows] == ["none", "none", "layer", "layer"]
    assert [row["settings"]["offload"] for row in rows] == ["none", "cpu"] * 2
    assert rows[0]["settings"] == SETTINGS
    outcome = cli("profile", "--check", "budgets.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("+0.0%") == 4 and "by category" not in outcome.out


def test_an_optimizer_in_the_backward_has_a_budget_of_its_own(cli, written):
    written()
    flags = ["profile", *FAST, "--offload", "none"]
    assert cli(*flags, "--optimizer-in-backward", "--write", "budgets.json").code == 0
    after, inside = (
        [row for row in written() if row["settings"]["optimizer_in_backward"] == each]
        for each in (False, True)
    )
    assert (len(after), len(inside)) == (4, 2)
    assert inside[0]["peak_allocated_bytes"] < after[0]["peak_allocated_bytes"]
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 0 and outcome.out.count("vit digits 2 in-backward h100, 6 x none") == 1


def test_growth_fails_with_the_difference_by_category(cli, written):
    peak = written()[0]["peak_allocated_bytes"]
    written("optimizer", -int(0.02 * peak))
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 1
    assert (
        "a peak must grow by at most 1% of its budget in budgets.json, got +2.0%, and 1 of 4"
        in (outcome.err)
    )
    assert "vit digits 2 h100, 6 x none, by category at the peak" in outcome.out
    lines = [line.strip() for line in outcome.out.splitlines()]
    (line,) = [line for line in lines if line.startswith("optimizer")]
    assert line.split()[-2].startswith("+") and line.endswith("iB")
    (line,) = [line for line in lines if line.startswith("temporaries")]
    assert "+" not in line
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("share, fails", [(0.0099, False), (0.0102, True)])
def test_the_limit_is_a_hundredth(share, fails):
    budget, now = Budget({}, 100_000, {}), Budget({}, int(100_000 * (1 + share)), {})
    assert Held(budget, now).exceeded is fails


def test_a_fall_passes_and_is_told(cli, written):
    written(by=2**24)
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 0
    assert "1 of the budgets may be lowered: add --update." in outcome.out


def test_update_takes_the_peaks_of_now(cli, written, tmp_path):
    before = written()
    written("optimizer", by=-(2**20))
    outcome = cli("profile", "--check", "budgets.json", "--update")
    assert outcome.code == 0 and "budgets from here on" in outcome.out
    assert json.loads((tmp_path / "budgets.json").read_text()) == before


def test_json_has_a_row_for_each_budget(cli, written):
    written(by=-(2**24), category="workspaces")
    outcome = cli("profile", "--check", "budgets.json", "--json")
    first, *others = (json.loads(line) for line in outcome.out.splitlines())
    assert outcome.code == 1
    assert first["exceeded"] and first["growth"] > 0.01
    assert first["peak_allocated_bytes"] - first["budget_bytes"] == 2**24
    assert {name: first[name] for name in SETTINGS} == SETTINGS
    assert [(row["exceeded"], row["growth"]) for row in others] == [(False, 0.0)] * 3


def test_write_replaces_rows_of_the_same_settings_alone(cli, written):
    before = written(by=2**20)
    assert cli("profile", *FAST, "--offload", "none", "--write", "budgets.json").code == 0
    rows = written()
    assert len(rows) == 4 and rows[1:] == before[1:]
    assert rows[0]["peak_allocated_bytes"] == before[0]["peak_allocated_bytes"] - 2**20


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preset": "huge"}, "row 1 of budgets.json, which is stale, must be of what there is: "),
        ({"family": "gpt"}, "family in row 1 of budgets.json, which is stale, must be of vit, dit"),
        (
            {"recompute": "some"},
            "recompute in row 1 of budgets.json, which is stale, must be of none, ",
        ),
        (
            {"method": "end_to_end"},
            "recompute in row 1 of budgets.json, which is stale, must be of null",
        ),
        ({"method": "compiled"}, "method in row 1 of budgets.json, which is stale, must be of end"),
        ({"offload": "some"}, "offload in row 1 of budgets.json, which is stale, must be of none"),
        (
            {"optimizer_in_backward": "both"},
            'optimizer_in_backward in row 1 of budgets.json must be bool, got "both"',
        ),
        ({"num_blocks": 13}, "num_blocks must be between 1 and the 12 layers, got 13"),
        ({"target": "tpu"}, "target must be one of cpu, a100, h100, h200, b200, got tpu"),
        ({"batch": 0}, "batch_size must be at least 1, got 0"),
        ({"batch": True}, "batch in row 1 of budgets.json must be int, got true"),
        ({"recompute": 1}, "recompute in row 1 of budgets.json must be str or null, got 1"),
        ({"depth": 1}, "settings in row 1 of budgets.json must be family, preset, "),
    ],
)
def test_a_row_that_cannot_be_held_is_named(cli, tmp_path, settings, message):
    parts = dict.fromkeys(
        ("gradients", "optimizer", "inputs", "saved_activations", "temporaries", "workspaces"), 0
    )
    row = {
        "settings": {**SETTINGS, **settings},
        "peak_allocated_bytes": 1,
        "by_category": {"parameters": 1, **parts},
    }
    (tmp_path / "budgets.json").write_text(json.dumps([row]))
    assert refused(cli("profile", "--check", "budgets.json"), message)
    assert json.loads((tmp_path / "budgets.json").read_text()) == [row]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--check none.json", "No such file or directory: none.json"),
        ("--update", "update must come with check and its file, got none"),
    ],
)
def test_rejects(cli, flags, message):
    assert refused(cli("profile", *flags.split()), message)


def test_a_file_that_is_no_json_is_refused(cli, tmp_path):
    (tmp_path / "budgets.json").write_text("{")
    assert refused(cli("profile", "--check", "budgets.json"), "budgets.json must be JSON, got")


def test_a_compilers_choice_is_not_held(tmp_path):
    with pytest.raises(ValueError, match=r"methods to write must be of end_to_end, .* got none"):
        module.write(tmp_path / "b.json", [{"method": "compiled"}])
    assert not (tmp_path / "b.json").exists()


def test_with_and_without_offload_take_one_dry_run(written, tmp_path, monkeypatch):
    calls, real = [], module._predicted
    monkeypatch.setattr(module, "_predicted", lambda s: calls.append(s["recompute"]) or real(s))
    written()
    assert len(held(tmp_path / "budgets.json")) == 4
    assert calls == ["none", "layer"]
