import json
import pickle
from types import SimpleNamespace

import pytest
from cli.runs import refused

from dbkernels.cli import profile
from dbkernels.memory.measure import MEASURED
from dbkernels.memory.trace import CATEGORIES
from dbkernels.memory.workspace import TARGETS
from dbkernels.training.rehearsal import trainer_with

FAST = ["--batch", "2", "--steps", "1", "--device", "cpu"]
ONE = ["--methods", "block_fused", "--rungs", "qkv", "--num-blocks", "6", "--resident", "block"]
FEW = ["--methods", "end_to_end,block_fused", "--rungs", "none", "--num-blocks", "1,6"]


def rows(outcome):
    assert outcome.code == 0
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_json_has_a_row_for_every_way_of_training(cli):
    found = rows(cli("profile", "--batch", "2", "--num-blocks", "12", "--json"))
    keys = {(r["method"], r["num_blocks"], r["rung"], r["resident"]) for r in found}
    assert len(keys) == len(found) == 2 * (4 + 1 + 5)
    for row in found:
        assert set(row["by_category"]) == set(CATEGORIES)
        assert sum(row["by_category"].values()) == row["peak_allocated_bytes"]
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > row["saved_bytes"] > 0
        assert row["flops"] > 0 and ": " in row["at"]
        assert (row["family"], row["preset"], row["batch"]) == ("vit", "digits", 2)
        assert row["target"] == "h100" and not row["autocast"]
        assert "seconds_per_step" not in row


def test_filters_leave_what_they_name(cli):
    found = rows(cli("profile", *FEW, "--resident", "block", "--json", "--target", "cpu"))
    assert [(r["method"], r["num_blocks"]) for r in found] == [
        ("end_to_end", 1),
        ("block_fused", 1),
        ("block_fused", 6),
    ]
    assert {row["resident"] for row in found} == {"block"}
    assert {row["by_category"]["workspaces"] for row in found} == {0}


def test_autocast_halves_what_is_kept(cli):
    narrow, wide = (
        rows(cli("profile", *ONE, "--batch", "64", "--json", *flags))[0]["saved_bytes"]
        for flags in (["--autocast"], [])
    )
    assert narrow < 0.8 * wide


def test_measured_stands_beside_predicted(cli):
    found = rows(cli("profile", *FAST, *FEW, "--measure", "--json"))
    for row in found:
        assert row["target"] == "cpu"
        if row["resident"] == "block":
            assert "measured_allocated_bytes" not in row
            continue
        assert set(row["measured_by_category"]) == set(MEASURED) and row["device"] == "cpu"
        measured = row["measured_allocated_bytes"]
        assert row["peak_allocated_bytes"] == pytest.approx(measured, rel=0.005)
        assert 0 < row["seconds_per_step"] <= row["seconds_per_sweep"]


def test_one_block_at_a_time_is_measured_on_a_gpu(cli, monkeypatch):
    taken = []

    def profiled(trainer, steps):
        taken.append((trainer.config.resident, trainer.device.type))
        on_gpu = {"allocated_bytes": 1, "reserved_bytes": 2}
        numbers = ("peak_bytes", "saved_bytes", "seconds_per_step", "seconds_per_sweep")
        others = {"device": "gpu", "by_category": {}, "first_step": {}, "steady_step": on_gpu}
        return {**dict.fromkeys(numbers, 9), **others}

    # the only device here, under another name
    monkeypatch.setattr(profile, "pick_device", lambda name: SimpleNamespace(type="gpu"))
    monkeypatch.setattr(profile, "target_of", lambda device: TARGETS["h100"])
    monkeypatch.setattr(profile, "profile_trainer", profiled)
    monkeypatch.setattr(profile, "trainer_with", with_device_cpu)
    found = rows(cli("profile", *FAST, *ONE, "--measure", "--json"))
    assert taken == [("block", "cpu")] and found[0]["measured_allocated_bytes"] == 1
    assert found[0]["measured_reserved_bytes"] == 2


def with_device_cpu(config, device, data, **ways):
    return trainer_with(config, "cpu", data, **ways)


def test_a_number_of_blocks_said_twice_counts_once(cli):
    found = rows(cli("profile", *ONE, "--num-blocks", "6,3,6", "--batch", "2", "--json"))
    assert [row["num_blocks"] for row in found] == [6, 3]


def test_compiled_code_is_not_measured_on_a_cpu(cli):
    (row,) = rows(
        cli("profile", *FAST, "--methods", "compiled", "--resident", "all", "--measure", "--json")
    )
    assert row["peak_allocated_bytes"] and "measured_allocated_bytes" not in row


def test_tables_fit_a_terminal(cli):
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
    assert "block_fused, rung qkv, 6 blocks" in (tmp_path / "step.svg").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-blocks 13", "num_blocks must be between 1 and the 12 layers, got 13"),
        ("--num-blocks 0", "num_blocks must be between 1 and the 12 layers, got 0"),
        ("--num-blocks 1;2", "num_blocks must be whole numbers with commas between, got 1;2"),
        ("--preset huge", "preset of vit must be one of cifar100, digits, got huge"),
        ("--batch 0", "batch and steps must be at least 1, got batch 0 and steps 1"),
        ("--steps 0", "batch and steps must be at least 1, got batch 2 and steps 0"),
        ("--device tpu --measure", "device must be auto, cpu or cuda, got tpu"),
        ("--budget 1.5", "budget must be from 0 to 1, got 1.5"),
        ("--methods fused", "methods must be of end_to_end, checkpointed, selective, compiled, "),
        ("--rungs all", "rungs must be of none, attention, mlp, qkv, layer, got all"),
        ("--resident none", "resident must be of all, block, got none"),
        ("--target v100", "target must be one of cpu, a100, h100, h200, b200, got v100"),
        ("--target h100 --measure", "target must be auto for measure, got h100"),
        ("--timeline t.pickle", "timeline and picture show one step, which methods, num_blocks, "),
    ],
)
def test_rejects(cli, flags, message):
    assert refused(cli("profile", *FAST, *flags.split()), message)
