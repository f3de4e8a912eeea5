import io
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.runs import rows_of
from rich.console import Console

from dbkernels.cli import profile
from dbkernels.cli.main import main
from dbkernels.cli.profile import measured_tables, predicted_tables
from dbkernels.memory.allocator import TARGETS
from dbkernels.memory.measure import MEASURED
from dbkernels.memory.tracker import CATEGORIES

GiB = 2**30
FAST = "profile --batch 2 --steps 1 --device cpu"
ONE = "--methods block_fused --recompute qkv --num-blocks 4 --offload cpu"

pytestmark = pytest.mark.usefixtures("shallow")


def test_json_has_a_row_for_every_way_of_training(cli):
    found = rows_of(cli("profile --batch 2 --num-blocks 4 --json"))
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
    flags = "--methods end_to_end,block_fused --recompute layer,none,layer --num-blocks 4,1,4"
    found = rows_of(cli(f"profile {flags} --offload cpu --json --target cpu --autocast"))
    ways = [(1, None), (4, "layer"), (4, "none"), (1, "layer"), (1, "none")]
    assert [(row["num_blocks"], row["recompute"]) for row in found] == ways
    assert {(row["offload"], row["autocast"]) for row in found} == {("cpu", True)}
    assert {row["by_category"]["workspaces"] for row in found} == {0}


def test_one_step_is_written_and_drawn(cli, tmp_path):
    shown = "--timeline step.pickle --picture step.svg"
    (row,) = rows_of(cli(f"profile {ONE} --json --batch 2 {shown}"))
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    assert reserved == row["peak_reserved_bytes"]
    assert "vit digits, batch 2: fused qkv, 4 blocks" in (tmp_path / "step.svg").read_text()


# one of several devices


def test_a_device_of_several_needs_less(cli):
    def found(flags):
        asked = "--methods block_fused --recompute qkv --num-blocks 4 --json"
        return rows_of(cli(f"profile {asked} {flags}"))

    (alone,) = found("--batch 4 --offload none")
    (shared,) = found("--batch 4 --data-parallel 2 --shard")
    assert (shared["data_parallel"], shared["shard"], shared["offload"]) == (2, True, "none")
    assert "data_parallel" not in alone and "tensor_parallel" not in shared
    assert shared["by_category"]["optimizer"] < 0.3 * alone["by_category"]["optimizer"]
    assert shared["peak_allocated_bytes"] < alone["peak_allocated_bytes"]
    # layers in plain torch are not cut
    cut = rows_of(
        cli("profile --batch 2 --recompute qkv --num-blocks 1 --tensor-parallel 2 --json")
    )
    assert [(each["method"], each["tensor_parallel"]) for each in cut] == [("block_fused", 2)]


def test_a_batch_that_nobody_gives_has_a_share_for_each_device():
    recipe = profile.Profile(data_parallel=3, tensor_parallel=2).recipe(TARGETS["h100"])
    assert (recipe.batch_size, recipe.share) == (3 * 128, 128)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data-parallel 2 --measure", "devices must be one for measure, got 2"),
        ("--data-parallel 0", "data_parallel must be at least 1, got 0"),
        ("--batch 3 --data-parallel 2", "batch_size must be a multiple of data_parallel 2, got 3"),
        (
            "--methods end_to_end --tensor-parallel 2",
            "tensor_parallel must be 1 for end_to_end, got 2",
        ),
        (
            "--num-blocks 1 --optimizer muon --batch 2 --data-parallel 2 --shard",
            "optimizer must be adamw",
        ),
    ],
)
def test_rejects_what_several_devices_cannot_do(flags, message, cli):
    outcome = cli(f"profile {flags}")
    assert outcome.code == 1 and message in " ".join(outcome.err.split())


# measured


def test_measured_stands_beside_predicted_where_a_cpu_can_tell(cli):
    flags = "--methods compiled,block_fused --recompute none --num-blocks 4"
    *unseen, row, last = rows_of(cli(f"{FAST} {flags} --measure --json"))
    for each in (*unseen, last):
        assert each["peak_allocated_bytes"] and each["target"] == "cpu"
        assert "measured_allocated_bytes" not in each
        assert each["method"] == "compiled" or each["offload"] == "cpu"
    assert set(row["measured_by_category"]) == set(MEASURED) and row["device"] == "cpu"
    measured = row["measured_allocated_bytes"]
    assert row["peak_allocated_bytes"] == pytest.approx(measured, rel=0.005)
    assert 0 < row["seconds_per_step"] <= row["seconds_per_sweep"]


def test_activations_off_the_device_are_told_and_not_measured_on_a_cpu(cli):
    flags = "--methods block_fused --recompute none --num-blocks 1 --offload none --target cpu"
    stays, moved = (
        rows_of(cli(f"profile {flags} --batch 64 --json{more}"))[0]
        for more in ("", " --offload-activations")
    )
    assert moved["saved_bytes"] < stays["saved_bytes"] and moved["flops"] == stays["flops"]
    assert moved["offload_activations"] and "offload_activations" not in stays
    flags = flags.replace("--target cpu", "--measure --offload-activations")
    outcome = cli(f"{FAST} {flags} --json --write budgets.json")
    assert "measured_allocated_bytes" not in rows_of(outcome)[0]
    assert "vit digits 2 activations-off cpu, 1 x none" in cli(CHECK).out


def test_a_gpu_runs_every_way_after_the_predictions_or_says_why_not(cli, monkeypatch):
    def predicted(recipes):
        for each in predict(recipes):
            order.append("predicted")
            yield each

    def measured(recipe, device, steps):
        assert (device, steps) == (gpu, 1)
        order.append((recipe.method, recipe.num_blocks, recipe.recompute, recipe.offload))
        return {"not_measured": "no [x]"}

    order, gpu, predict = [], SimpleNamespace(type="gpu"), profile.predicted
    places = {"pick_device": lambda name: gpu, "target_of": lambda device: TARGETS["h100"]}
    for name, stand_in in (places | {"predicted": predicted, "measured": measured}).items():
        monkeypatch.setattr(profile, name, stand_in)
    found = rows_of(cli(f"{FAST} {ONE} --offload none,cpu --measure --json"))
    assert [row["not_measured"] for row in found] == ["no [x]"] * 2
    ways = [("block_fused", 4, "qkv", offload) for offload in ("none", "cpu")]
    assert order == ["predicted"] * 2 + ways
    outcome = cli(f"{FAST} {ONE} --measure")
    assert outcome.code == 0
    assert outcome.out.endswith("fused qkv, 4, offload was not measured: no [x]\n")


# a file of budgets


@pytest.fixture(scope="module")
def four(tmp_path_factory, shallow):
    """A file of four budgets, to which the last two were added."""
    path = tmp_path_factory.mktemp("budgets") / "budgets.json"
    flags = f"--batch 2 --methods block_fused --recompute none --num-blocks 4 --write {path}"
    for more in ("", "--optimizer-in-backward"):
        main(["profile", *flags.split(), *more.split()])
    return path


@pytest.fixture
def written(cli, four, tmp_path):
    """Changes the first of the four budgets by some bytes of a category; all of them."""
    path = Path(shutil.copy(four, tmp_path))

    def changed(category="temporaries", by=0):
        found = json.loads(path.read_text())
        found[0]["by_category"][category] += by
        found[0]["peak_allocated_bytes"] += by
        path.write_text(json.dumps(found))
        return found

    return changed


CHECK = "profile --check budgets.json"


def test_what_profile_writes_it_holds(cli, written):
    _, after, _, inside = found = written()
    names = ("optimizer_in_backward", "offload")
    keys = [tuple(row["settings"][name] for name in names) for row in found]
    assert keys == [(early, place) for early in (False, True) for place in ("none", "cpu")]
    assert inside["settings"] == {**after["settings"], "optimizer_in_backward": True}
    assert inside["peak_allocated_bytes"] < after["peak_allocated_bytes"]
    outcome = cli(CHECK)
    assert outcome.code == 0
    assert [line.partition(": ")[0] for line in outcome.err.splitlines()] == [
        f"vit digits 2{early} h100, 4 x none{place}"
        for early in ("", " in-backward")
        for place in ("", ", offload cpu")
    ]
    assert outcome.out.count("+0.0%") == 4 and "optimizer" not in outcome.out
    assert outcome.out.count("vit digits 2 in-backward h100, 4 x none") == 2


def test_a_budget_of_another_optimizer_stands_beside_that_of_adamw(cli, tmp_path):
    for optimizer in ("adamw", "muon"):
        cli(f"profile {ONE} --batch 2 --optimizer {optimizer} --write budgets.json")
    adamw, muon = json.loads((tmp_path / "budgets.json").read_text())
    assert muon["settings"] == {**adamw["settings"], "optimizer": "muon"}
    assert muon["by_category"]["optimizer"] < adamw["by_category"]["optimizer"]
    outcome = cli(CHECK)
    assert outcome.code == 0 and outcome.out.count("vit digits 2 muon h100, 4 x qkv") == 1


def test_growth_fails_with_the_difference_by_category_in_a_screen_and_in_json(cli, written):
    before, *_ = written("optimizer", -int(0.02 * written()[0]["peak_allocated_bytes"]))
    outcome = cli(CHECK)
    assert outcome.code == 1
    message = "a peak must grow by at most 1% of its budget in budgets.json, got +2.0%, and 1 of 4"
    assert message in outcome.err
    lines = [line.strip() for line in outcome.out.splitlines()]
    assert max(map(len, lines)) <= 80
    (at,) = [i for i, line in enumerate(lines) if line.startswith("vit digits 2 h100, 4 x none  ")]
    rows = [line.split("│") for line in lines[at + 1 : at + 1 + len(CATEGORIES)]]
    assert [cells[0].strip().replace(" ", "_") for cells in rows] == list(CATEGORIES)
    changes = {cells[0].strip(): cells[-1].split() for cells in rows}
    sign, unit = changes.pop("optimizer")
    assert sign.startswith("+") and unit.endswith("iB") and not any(changes.values())
    outcome = cli(f"{CHECK} --json")
    first, *others = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1 and first["exceeded"] and first["growth"] > 0.01
    assert first["budget_bytes"] == before["peak_allocated_bytes"] < first["peak_allocated_bytes"]
    assert before["settings"].items() <= first.items()
    assert [(row["exceeded"], row["growth"]) for row in others] == [(False, 0.0)] * 3


def test_a_fall_passes_and_is_told_and_an_update_takes_the_peaks_of_now(cli, written):
    before = written()
    written(by=2**24)
    outcome = cli(CHECK)
    assert outcome.code == 0
    assert "1 of the budgets may be lowered: add --update." in outcome.out
    outcome = cli(f"{CHECK} --update")
    assert outcome.code == 0 and "budgets from here on" in outcome.out
    assert written() == before


# tables


def row(method="block_fused", num_blocks=2, recompute="none", offload="none", size=GiB, **more):
    way = {"method": method, "num_blocks": num_blocks, "recompute": recompute, "offload": offload}
    asked = {"family": "dit", "preset": "XL/2", "batch": 128, "target": "h100"}
    return {
        **{"autocast": True, "optimizer_in_backward": False, **asked, **way},
        **{"peak_allocated_bytes": size, "peak_reserved_bytes": 2 * size},
        **{"by_category": dict.fromkeys(CATEGORIES, size // 8), "at": "backward: aten::mm"},
        **{"flops": 12.34e12, **more},
    }


def printed(tables):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    return lines


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimizer_in_backward", "optimizer in backward"),
        ("offload_activations", "what the backward needs off the device"),
    ],
)
def test_a_title_says_what_was_trained_and_the_unit(told, name, words):
    lines = printed(predicted_tables([row(**{name: told}, size=3 * 2**20)]))
    assert "dit XL/2, batch 128, bfloat16 compute" in lines[0]
    assert any(words in line for line in lines) == told
    assert "MiB" in lines[1 + told]


@pytest.mark.parametrize(
    "shared, words",
    [
        ({}, None),
        ({"data_parallel": 8}, "one of 8 devices"),
        ({"data_parallel": 8, "shard": True}, "one of 8 devices, parameters shared out"),
        (
            {"data_parallel": 8, "tensor_parallel": 2, "shard": True},
            "one of 16 devices, 2 to a layer, parameters shared out",
        ),
    ],
)
def test_a_title_says_how_devices_share_a_step(shared, words):
    lines = [line.strip() for line in printed(predicted_tables([row(**shared)]))]
    assert [line for line in lines if line.startswith("one of ")] == 2 * [words] * bool(words)


COUNTS = [row(num_blocks=count, size=count * GiB) for count in (1, 2, 3, 4, 6)]
END_TO_END = [row("end_to_end", 1, None, offload=name, size=50 * GiB) for name in ("none", "cpu")]
BOTH = [END_TO_END[0], row(), row(offload="cpu", size=GiB // 2)]
TIMES = {"measured_allocated_bytes": 2 * GiB, "seconds_per_step": 0.5, "seconds_per_sweep": 1.0}
LONG = {**TIMES, "seconds_per_step": 12.3, "seconds_per_sweep": 98.7}
SMALL = ["0.12|0.12|0.12|0.12|0.12|0.12|0.12"]


@pytest.mark.parametrize(
    ("tables", "rows", "name", "cells"),
    [
        # a column for each number of blocks, for bytes, reserved bytes and operations
        (predicted_tables, COUNTS, "fused none",
         ["none|1.00|2.00|3.00|4.00|6.00", "none|2.00|4.00|6.00|8.00|12.0", "none" + 5 * "|12340"]),
        # what has no such number of blocks is left empty
        (predicted_tables, BOTH, "end to end", ["|50.0|", "|100|", "|12340|"]),
        (predicted_tables, BOTH, "fused none",
         ["none||1.00", "cpu||0.50", "none||2.00", "cpu||1.00", "none||12340"]),
        # small models are told in MiB
        (predicted_tables, [row(size=3 * 2**20)], "fused none",
         ["none|3.00", "none|6.00", "none|12340"]),
        # few rows are shown by category, with the op below it, and many are not
        (predicted_tables, [row()], "fused none, 2", SMALL),
        (predicted_tables, [row(at="backward: aten::" + "x" * 70)], "x" * 24, ["||||||"]),
        (predicted_tables, [row(at="start")], "start", ["||||||"]),
        (predicted_tables, [row(recompute=n) for n in "abcdefghijkl"], "fused a, 2", SMALL),
        (predicted_tables, [row(recompute=n) for n in "abcdefghijklm"], "fused a, 2", []),
        (measured_tables, [row(**TIMES), row(offload="cpu")], "fused none",
         ["2|1.00|2.00|-50.0%|500|1000", "2, offload|1.00||||"]),
        # the longest of all fits a line
        (measured_tables, [row("block_fused", 12, "attention", "cpu", **LONG)], "fused attention",
         ["12, offload|1.00|2.00|-50.0%|12300|98700"]),
        # end to end has one line whatever is on the device
        (predicted_tables, END_TO_END, "end to end", ["|50.0", "|100", "|12340"]),
        (predicted_tables, END_TO_END, "end to end, 1", ["6.25|6.25|6.25|6.25|6.25|6.25|6.25"]),
        (measured_tables, END_TO_END, "end to end", ["1|50.0||||"]),
    ],
)  # fmt: skip
def test_a_table_has_these_cells_beside_a_name(tables, rows, name, cells):
    lines = ([cell.strip() for cell in line.split("│")] for line in printed(tables(rows)))
    assert ["|".join(line[1:]) for line in lines if line[0] == name and line[1:]] == cells


def test_what_was_not_measured_has_a_sentence_each():
    lost = {"not_measured": "too large"}
    every = [*({**each, **lost} for each in END_TO_END), row(), row(offload="cpu", **lost)]
    assert list(measured_tables(every))[1:] == [
        "end to end, 1 was not measured: too large",
        "fused none, 2, offload was not measured: too large",
    ]
