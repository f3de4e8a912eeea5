import json
import pickle
from types import SimpleNamespace

import pytest
from cli.runs import refused

from dbkernels.cli import profile
from dbkernels.cli.profile_measured import taken
from dbkernels.memory.measure import MEASURED
from dbkernels.memory.trace import CATEGORIES
from dbkernels.memory.workspace import TARGETS

FAST = ["--batch", "2", "--steps", "1", "--device", "cpu"]
ONE = ["--methods", "block_fused", "--recompute", "qkv", "--num-blocks", "6", "--offload", "cpu"]
FEW = ["--methods", "end_to_end,block_fused", "--recompute", "none", "--num-blocks", "1,6"]


def rows(outcome):
    assert outcome.code == 0
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_json_has_a_row_for_every_way_of_training(cli):
    found = rows(cli("profile", "--batch", "2", "--num-blocks", "12", "--json"))
    keys = {(r["method"], r["num_blocks"], r["recompute"], r["offload"]) for r in found}
    assert len(keys) == len(found) == 2 * (4 + 1 + 6)
    for row in found:
        assert set(row["by_category"]) == set(CATEGORIES)
        assert sum(row["by_category"].values()) == row["peak_allocated_bytes"]
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > row["saved_bytes"] > 0
        assert row["flops"] > 0 and ": " in row["at"]
        assert (row["family"], row["preset"], row["batch"]) == ("vit", "digits", 2)
        assert row["target"] == "h100" and not row["autocast"]
        assert "seconds_per_step" not in row


def test_filters_leave_what_they_name(cli):
    found = rows(cli("profile", *FEW, "--offload", "cpu", "--json", "--target", "cpu"))
    assert [(r["method"], r["num_blocks"]) for r in found] == [
        ("end_to_end", 1),
        ("block_fused", 1),
        ("block_fused", 6),
    ]
    assert {row["offload"] for row in found} == {"cpu"}
    assert {row["by_category"]["workspaces"] for row in found} == {0}


def test_autocast_halves_what_is_kept(cli):
    narrow, wide = (
        rows(cli("profile", *ONE, "--batch", "64", "--json", *flags))[0]["saved_bytes"]
        for flags in (["--autocast"], [])
    )
    assert narrow < 0.8 * wide


def test_measured_stands_beside_predicted(cli):
    found = rows(cli("profile", *FAST, *FEW, "--num-blocks", "6", "--measure", "--json"))
    assert len(found) == 4
    for row in found:
        assert row["target"] == "cpu"
        if row["offload"] == "cpu":
            assert "measured_allocated_bytes" not in row
            continue
        assert set(row["measured_by_category"]) == set(MEASURED) and row["device"] == "cpu"
        measured = row["measured_allocated_bytes"]
        assert row["peak_allocated_bytes"] == pytest.approx(measured, rel=0.005)
        assert 0 < row["seconds_per_step"] <= row["seconds_per_sweep"]


def test_one_block_at_a_time_is_measured_on_a_gpu(cli, monkeypatch):
    asked, gpu = [], SimpleNamespace(type="gpu")

    def measured(case, offload, config, **settings):
        asked.append((case.method, case.num_blocks, case.recompute, offload, settings))
        return {"measured_allocated_bytes": 1}

    monkeypatch.setattr(profile, "pick_device", lambda name: gpu)
    monkeypatch.setattr(profile, "target_of", lambda device: TARGETS["h100"])
    monkeypatch.setattr(profile, "measured", measured)
    (row,) = rows(cli("profile", *FAST, *ONE, "--measure", "--json"))
    settings = {"budget": 0.5, "steps": 1, "device": gpu}
    assert asked == [("block_fused", 6, "qkv", "cpu", settings)]
    assert row["measured_allocated_bytes"] == 1


def test_a_case_that_does_not_fit_keeps_its_row_and_says_why(cli, monkeypatch):
    monkeypatch.setattr(profile, "measured", lambda *case, **settings: {"not_measured": "no [x]"})
    flags = ["profile", *FAST, *FEW, "--offload", "none", "--measure"]
    found = rows(cli(*flags, "--json"))
    assert [row["not_measured"] for row in found] == ["no [x]"] * 3
    outcome = cli(*flags)
    assert outcome.code == 0
    assert outcome.out.endswith("fused none, 6 was not measured: no [x]\n")


def test_no_step_is_timed_while_another_is_predicted(cli, monkeypatch):
    def predicted(todo, *rest, **settings):
        for row in predict(todo, *rest, **settings):
            order.append("predicted")
            yield row

    def measured(*case, **settings):
        order.append("measured")
        return {}

    order, predict = [], profile.rows
    monkeypatch.setattr(profile, "rows", predicted)
    monkeypatch.setattr(profile, "measured", measured)
    cli("profile", *FAST, *FEW, "--offload", "none", "--measure", "--json")
    assert order == ["predicted"] * 3 + ["measured"] * 3


def test_a_number_of_blocks_said_twice_counts_once(cli):
    found = rows(cli("profile", *ONE, "--num-blocks", "6,3,6", "--batch", "2", "--json"))
    assert [row["num_blocks"] for row in found] == [6, 3]


def test_compiled_code_is_not_measured_on_a_cpu(cli):
    (row,) = rows(
        cli("profile", *FAST, "--methods", "compiled", "--offload", "none", "--measure", "--json")
    )
    assert row["peak_allocated_bytes"] and "measured_allocated_bytes" not in row


def test_tables_fit_a_terminal(cli, monkeypatch):
    # a process for each takes seconds to begin
    monkeypatch.setattr(profile, "measured", taken)
    for flags in ([], [*FAST, "--measure"]):
        outcome = cli("profile", *FEW, *flags)
        lines = outcome.out.splitlines()
        assert outcome.code == 0 and "…" not in outcome.out
        assert max(map(len, lines)) <= 80
        assert sum("fused none" in line for line in lines) >= 2


def test_one_step_is_written_and_drawn(cli, tmp_path):
    shown = ["--timeline", "step.pickle", "--picture", "step.svg"]
    outcome = cli("profile", *ONE, "--json", "--batch", "2", *shown)
    (row,) = rows(outcome)
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    assert reserved == row["peak_reserved_bytes"]
    assert "block_fused, recompute qkv, 6 blocks" in (tmp_path / "step.svg").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-blocks 13", "num_blocks must be between 1 and the 12 layers, got 13"),
        ("--num-blocks 0", "num_blocks must be between 1 and the 12 layers, got 0"),
        ("--num-blocks 1;2", "num_blocks must be whole numbers with commas between, got 1;2"),
        ("--preset huge", "preset of ViT must be one of cifar100, digits, got huge"),
        ("--batch 0", "batch and steps must be at least 1, got batch 0 and steps 1"),
        ("--steps 0", "batch and steps must be at least 1, got batch 2 and steps 0"),
        ("--device tpu --measure", "device must be auto, cpu or cuda, got tpu"),
        ("--budget 1.5", "budget must be from 0 to 1, got 1.5"),
        ("--methods fused", "methods must be of end_to_end, checkpointed, selective, compiled, "),
        (
            "--recompute all",
            "recompute must be of none, attention, mlp, qkv, layer, layer_narrow, got all",
        ),
        ("--offload some", "offload must be of none, cpu, got some"),
        ("--target v100", "target must be one of cpu, a100, h100, h200, b200, got v100"),
        ("--target h100 --measure", "target must be auto for measure, got h100"),
        ("--timeline t.pickle", "timeline and picture show one step: methods, num_blocks, "),
    ],
)
def test_rejects(cli, flags, message):
    assert refused(cli("profile", *FAST, *flags.split()), message)
