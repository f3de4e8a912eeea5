import io
import json
import pickle
from types import SimpleNamespace

import pytest
from cli.runs import refused
from rich.console import Console

from dbkernels.cli import profile
from dbkernels.cli.profile_tables import (
    FEW,
    OP,
    SHORT,
    measured_tables,
    not_measured,
    predicted_tables,
)
from dbkernels.memory.allocator import TARGETS
from dbkernels.memory.measure import MEASURED
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.planning.measure import figures_of

GiB = 2**30
FAST = ["--batch", "2", "--steps", "1", "--device", "cpu"]
ONE = ["--methods", "block_fused", "--recompute", "qkv", "--num-blocks", "6", "--offload", "cpu"]
FEW_WAYS = ["--methods", "end_to_end,block_fused", "--recompute", "none", "--num-blocks", "1,6"]


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


def test_filters_leave_what_they_name_in_its_order_and_once(cli):
    flags = [*FEW_WAYS, "--num-blocks", "6,1,6", "--recompute", "layer, none,layer"]
    found = rows(cli("profile", *flags, "--offload", "cpu", "--json", "--target", "cpu"))
    ways = [(1, None), (6, "layer"), (6, "none"), (1, "layer"), (1, "none")]
    assert [(row["num_blocks"], row["recompute"]) for row in found] == ways
    assert {row["offload"] for row in found} == {"cpu"}
    assert {row["by_category"]["workspaces"] for row in found} == {0}


def test_autocast_halves_what_is_kept(cli):
    narrow, wide = (
        rows(cli("profile", *ONE, "--batch", "64", "--json", *flags))[0]["saved_bytes"]
        for flags in (["--autocast"], [])
    )
    assert narrow < 0.8 * wide


def test_one_step_is_written_and_drawn(cli, tmp_path):
    shown = ["--timeline", "step.pickle", "--picture", "step.svg"]
    (row,) = rows(cli("profile", *ONE, "--json", "--batch", "2", *shown))
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
            "--recompute none,all",
            "recompute must be of none, attention, mlp, qkv, layer, layer_narrow, got all",
        ),
        ("--offload some", "offload must be of none, cpu, got some"),
        ("--target v100", "target must be one of cpu, a100, h100, h200, b200, got v100"),
        ("--target h100 --measure", "target must be auto for measure, got h100"),
        ("--timeline t.pickle", "timeline and picture show one step: methods, num_blocks, "),
        ("--check none.json", "No such file or directory: none.json"),
        ("--update", "update must come with check and its file, got none"),
    ],
)
def test_rejects(cli, flags, message):
    assert refused(cli("profile", *FAST, *flags.split()), message)


# measured


def test_measured_stands_beside_predicted(cli):
    found = rows(cli("profile", *FAST, *FEW_WAYS, "--num-blocks", "6", "--measure", "--json"))
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

    def measured(recipe, device, steps):
        asked.append((recipe.method, recipe.num_blocks, recipe.recompute, recipe.offload))
        assert (device, steps) == (gpu, 1)
        return {"measured_allocated_bytes": 1}

    monkeypatch.setattr(profile, "pick_device", lambda name: gpu)
    monkeypatch.setattr(profile, "target_of", lambda device: TARGETS["h100"])
    monkeypatch.setattr(profile, "measured", measured)
    (row,) = rows(cli("profile", *FAST, *ONE, "--measure", "--json"))
    assert asked == [("block_fused", 6, "qkv", "cpu")]
    assert row["measured_allocated_bytes"] == 1


def test_compiled_code_is_not_measured_on_a_cpu(cli):
    (row,) = rows(
        cli("profile", *FAST, "--methods", "compiled", "--offload", "none", "--measure", "--json")
    )
    assert row["peak_allocated_bytes"] and "measured_allocated_bytes" not in row


def test_a_recipe_that_does_not_fit_keeps_its_row_and_says_why(cli, monkeypatch):
    monkeypatch.setattr(profile, "measured", lambda *_: {"not_measured": "no [x]"})
    flags = ["profile", *FAST, *FEW_WAYS, "--offload", "none", "--measure"]
    found = rows(cli(*flags, "--json"))
    assert [row["not_measured"] for row in found] == ["no [x]"] * 3
    outcome = cli(*flags)
    assert outcome.code == 0
    assert outcome.out.endswith("fused none, 6 was not measured: no [x]\n")


def test_no_step_is_timed_while_another_is_predicted(cli, monkeypatch):
    def predicted(recipes):
        for each in predict(recipes):
            order.append("predicted")
            yield each

    order, predict = [], profile.predicted
    monkeypatch.setattr(profile, "predicted", predicted)
    monkeypatch.setattr(profile, "measured", lambda *_: order.append("measured") or {})
    cli("profile", *FAST, *FEW_WAYS, "--offload", "none", "--measure", "--json")
    assert order == ["predicted"] * 3 + ["measured"] * 3


# a file of budgets


@pytest.fixture
def written(cli, tmp_path):
    """A file of four budgets, and a way to change the first of them."""
    flags = ["--batch", "2", *ONE[:3], "none,layer", *ONE[4:6]]
    assert cli("profile", *flags, "--write", "budgets.json").code == 0
    path = tmp_path / "budgets.json"

    def changed(category="temporaries", by=0):
        found = json.loads(path.read_text())
        found[0]["by_category"][category] += by
        found[0]["peak_allocated_bytes"] += by
        path.write_text(json.dumps(found))
        return found

    return changed


def test_what_profile_writes_it_holds(cli, written):
    keys = [tuple(row["settings"][name] for name in ("recompute", "offload")) for row in written()]
    assert keys == [
        (recompute, name) for recompute in ("none", "layer") for name in ("none", "cpu")
    ]
    outcome = cli("profile", "--check", "budgets.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("+0.0%") == 4 and "by category" not in outcome.out


def test_an_optimizer_in_the_backward_has_a_budget_of_its_own(cli, written):
    flags = ["--batch", "2", *ONE, "--recompute", "none", "--optimizer-in-backward"]
    assert cli("profile", *flags, "--write", "budgets.json").code == 0
    _, after, *_, inside = written()
    assert inside["settings"] == {**after["settings"], "optimizer_in_backward": True}
    assert inside["peak_allocated_bytes"] < after["peak_allocated_bytes"]
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 0
    assert outcome.out.count("vit digits 2 in-backward h100, 6 x none") == 1


def test_growth_fails_with_the_difference_by_category(cli, written):
    written("optimizer", -int(0.02 * written()[0]["peak_allocated_bytes"]))
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 1
    message = "a peak must grow by at most 1% of its budget in budgets.json, got +2.0%, and 1 of 4"
    assert message in outcome.err
    assert "vit digits 2 h100, 6 x none, by category at the peak" in outcome.out
    lines = [line.strip() for line in outcome.out.splitlines()]
    (line,) = [line for line in lines if line.startswith("optimizer")]
    assert line.split()[-2].startswith("+") and line.endswith("iB")
    (line,) = [line for line in lines if line.startswith("temporaries")]
    assert "+" not in line
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_a_fall_passes_and_is_told(cli, written):
    written(by=2**24)
    outcome = cli("profile", "--check", "budgets.json")
    assert outcome.code == 0
    assert "1 of the budgets may be lowered: add --update." in outcome.out


def test_update_takes_the_peaks_of_now(cli, written):
    before = written()
    written("optimizer", by=-(2**20))
    outcome = cli("profile", "--check", "budgets.json", "--update")
    assert outcome.code == 0 and "budgets from here on" in outcome.out
    assert written() == before


def test_json_has_a_row_for_each_budget(cli, written):
    settings = written(by=-(2**24), category="workspaces")[0]["settings"]
    outcome = cli("profile", "--check", "budgets.json", "--json")
    first, *others = (json.loads(line) for line in outcome.out.splitlines())
    assert outcome.code == 1
    assert first["exceeded"] and first["growth"] > 0.01
    assert first["peak_allocated_bytes"] - first["budget_bytes"] == 2**24
    assert {name: first[name] for name in settings} == settings
    assert [(row["exceeded"], row["growth"]) for row in others] == [(False, 0.0)] * 3


# tables


def row(method="block_fused", num_blocks=2, recompute="none", offload="none", size=GiB, **more):
    return {
        "family": "dit",
        "preset": "XL/2",
        "batch": 128,
        "autocast": True,
        "optimizer_in_backward": False,
        "target": "h100",
        "method": method,
        "num_blocks": num_blocks,
        "recompute": recompute,
        "offload": offload,
        "peak_allocated_bytes": size,
        "peak_reserved_bytes": 2 * size,
        "by_category": dict.fromkeys(CATEGORIES, size // 8),
        "at": "backward: aten::mm",
        "flops": 12.34e12,
        **more,
    }


def printed(tables):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    return lines


def cells_of(lines, start):
    """The cells of each line that starts so."""
    return [
        [c.strip() for c in line.split("│")] for line in lines if line.strip().startswith(start)
    ]


def test_tables_fit_a_terminal(cli, monkeypatch):
    # a process for each takes seconds to begin
    monkeypatch.setattr(profile, "measured", figures_of)
    for flags in ([], [*FAST, "--measure"]):
        outcome = cli("profile", *FEW_WAYS, *flags)
        lines = outcome.out.splitlines()
        assert outcome.code == 0 and "…" not in outcome.out
        assert max(map(len, lines)) <= 80
        assert sum("fused none" in line for line in lines) >= 2


@pytest.mark.parametrize("told", [False, True])
def test_a_title_says_what_was_trained(told):
    lines = printed(predicted_tables([row(optimizer_in_backward=told)]))
    assert "dit XL/2, batch 128, bfloat16 compute" in lines[0]
    assert any("optimizer in backward" in line for line in lines) == told


def test_each_number_of_blocks_has_a_column_of_bytes_reserved_bytes_and_operations():
    counts = (1, 2, 3, 4, 6)
    lines = printed(predicted_tables([row(num_blocks=count, size=count * GiB) for count in counts]))
    allocated, reserved, operations = cells_of(lines, "fused none")[:3]
    assert allocated == ["fused none", "none", *(f"{count}.00" for count in counts)]
    assert reserved[2:] == ["2.00", "4.00", "6.00", "8.00", "12.0"]
    assert operations[2:] == ["12340"] * 5


def test_what_has_no_such_number_of_blocks_is_left_empty():
    every = [row("end_to_end", 1, None, size=50 * GiB), row(), row(offload="cpu", size=GiB // 2)]
    lines = printed(predicted_tables(every))
    assert cells_of(lines, "end to end")[0] == ["end to end", "", "50.0", ""]
    fused = cells_of(lines, "fused none")
    assert fused[:2] == [["fused none", "none", "", "1.00"], ["fused none", "cpu", "", "0.50"]]
    # allocated and reserved bytes and categories of both, operations of one
    assert len(fused) == 2 + 2 + 2 + 1


def test_small_models_are_told_in_mebibytes():
    lines = printed(predicted_tables([row(size=3 * 2**20)]))
    assert "MiB" in lines[1] and cells_of(lines, "fused none")[0][-1] == "3.00"


def test_few_rows_are_shown_by_category_and_many_are_not():
    lines = printed(predicted_tables([row(at="backward: aten::" + "x" * 70)]))
    index = next(i for i, line in enumerate(lines) if "fused none, 2" in line)
    (cells,) = cells_of(lines, "fused none, 2")
    assert cells[1:] == ["0.12"] * len(CATEGORIES)
    below = [line.split("│")[0].strip() for line in lines[index + 1 :][:2]]
    assert below == ["backward:", "x" * OP]
    assert set(SHORT) == set(CATEGORIES)
    many = [row(num_blocks=count) for count in range(1, FEW + 2)]
    assert len(list(predicted_tables(many))) == len(list(predicted_tables([row()]))) - 1


def test_a_peak_at_the_start_has_no_op():
    assert "  start" in str(printed(predicted_tables([row(at="start")])))


def test_predicted_stands_beside_measured_in_a_table():
    taken = {"measured_allocated_bytes": 2 * GiB, "seconds_per_step": 0.5, "seconds_per_sweep": 1.0}
    lines = printed(measured_tables([row(**taken), row(offload="cpu")]))
    measured, alone = cells_of(lines, "fused none")
    assert measured == ["fused none", "2", "1.00", "2.00", "-50.0%", "500", "1000"]
    assert alone == ["fused none", "2, offload", "1.00"] + [""] * 4
    # the longest of all fits a line
    taken |= {"seconds_per_step": 12.3, "seconds_per_sweep": 98.7}
    longest = row(num_blocks=12, recompute="attention", offload="cpu", **taken)
    assert cells_of(printed(measured_tables([longest])), "fused")[0][1] == "12, offload"


def test_end_to_end_has_one_line_whatever_is_on_the_device():
    lost = {"not_measured": "too large"}
    every = [row("end_to_end", 1, None, offload=name, **lost) for name in ("none", "cpu")]
    for table in (*predicted_tables(every), *measured_tables(every)):
        (line,) = cells_of(printed([table]), "end")
        assert line[0] in ("end to end", "end to end, 1")
    assert list(not_measured([*every, row(), row(offload="cpu", **lost)])) == [
        "end to end, 1 was not measured: too large",
        "fused none, 2, offload was not measured: too large",
    ]
