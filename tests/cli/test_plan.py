import os

import pytest
from cli.runs import rows_of
from planning.reckoned import reckoned, wide

from dbkernels.cli.plan import Plan
from dbkernels.memory.allocator import TARGETS
from dbkernels.planning import meshes
from dbkernels.planning import search as module


@pytest.fixture
def quick(cli, monkeypatch):
    """Plans for a batch of 64 of a DiT of the digits; more flags may follow."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(module, "estimate", reckoned)
    asked = "--family dit --target cpu --batch 64"
    return lambda memory, flags="": cli(f"plan --memory {memory} {asked} {flags}")


@pytest.fixture
def planned(quick):
    """All rows, and the plans among them."""

    def found(memory, flags=""):
        every = rows_of(quick(memory, f"{flags} --json"))
        return every, [row for row in every if row["row"] == "plan"]

    return found


def test_a_plan_of_a_preset_is_a_command_that_train_takes(shallow, cli, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    every = rows_of(cli("plan --memory 120MiB --target cpu --batch 4 --json"))
    plans = [row for row in every if row["row"] == "plan"]
    assert {row["num_blocks"] for row in plans} == {1, 2, 3, 4} and len(plans) == 7
    times = [row["relative_time"] for row in plans]
    assert times == sorted(times) and times[0] == 1.0 and plans[0]["num_blocks"] == 1
    assert all(row["peak_reserved_bytes"] <= 120 * 2**20 for row in plans)
    assert every[-1]["largest"] == "cifar100"
    command = plans[-1]["command"].removeprefix("python -m dbkernels ")
    trained = cli(f"{command} --steps 1 --data data.npz --out out --device cpu")
    assert trained.code == 0, trained.err


def test_rows_carry_the_question_and_what_limits_is_the_largest_share(planned, quick):
    every, plans = planned("1000MiB")
    assert [row["row"] for row in every] == ["limit"] * 2 + ["plan"] * len(plans) + ["preset"]
    assert all(row["memory"] == 1000 * 2**20 and row["preset"] == "digits" for row in every)
    assert every[-1]["largest"] == "XL/2"
    whole, best, *_ = every
    assert (whole["of"], whole["limit"]) == ("end to end", "saved_activations")
    for row in (whole, best):
        assert sum(row["by_category"].values()) == row["peak_reserved_bytes"]
        assert row["by_category"]["stem_and_head"] == best["by_category"]["stem_and_head"] > 0
    assert planned("60MiB")[0][1]["limit"] == "optimizer"
    assert "of it optimizer of the layers" in quick("60MiB").out.replace("\n", " ")


def test_the_screen_fits_and_leads_with_what_limits(planned, quick):
    _, plans = planned("1000MiB")
    text = quick("1000MiB").out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert lines[0] == "dit digits, batch 64, float32 compute, on cpu with 1000 MiB"
    said = " ".join(lines[1:4])
    assert "it needs 8.62 GiB" in said and "does not fit: saved activations limit this run" in said
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("blocks"))
    for row, line in zip(plans, lines[at + 2 :], strict=False):
        *choices, peak, time = (cell.strip() for cell in line.split("│"))
        place = {"none": "all blocks", "cpu": "one block"}[row["offload"]]
        expected = row["num_blocks"], row["recompute"], place, row["micro_batch"]
        assert choices == [*map(str, expected)] and peak.endswith("iB")
        assert time == f"{row['relative_time']:.2f}"
    assert "Largest preset of dit that fits at all: XL/2." in lines
    assert "not measured" in text
    assert "and fits: saved activations limit" in " ".join(quick("100000MiB").out.split())


def test_the_command_has_every_choice_that_differs_from_the_defaults(planned, quick):
    _, plans = planned("150MiB", "--autocast")
    one = next(row for row in plans if row["offload"] == "cpu")
    start = "python -m dbkernels train dit --preset digits --batch-size 64"
    cut = 64 // one["micro_batch"]
    middle = f"--num-blocks {one['num_blocks']} --recompute {one['recompute']}"
    end = "--offload cpu --steps-per-swap 0 --autocast"
    assert cut > 1 and one["command"] == f"{start} {middle} --accumulate {cut} {end}"
    first = plans[0]["command"].split(" --num-blocks")
    text = quick("150MiB", "--autocast").out
    assert f"  {first[0]} \\\n    --num-blocks{first[1]}\n" in text
    _, (*_, whole) = planned("1000000MiB")
    assert "--accumulate" not in whole["command"]


def test_plans_of_several_devices_say_how_they_share_a_step(planned, quick):
    flags = "--data-parallel 2 --tensor-parallel 2 --shard"
    every, plans = planned("500MiB", flags)
    shared = {"data_parallel": 2, "tensor_parallel": 2, "shard": True}
    assert all(shared.items() <= row.items() for row in every)
    # a share of 32 samples is cut
    assert all(32 % row["micro_batch"] == 0 for row in plans)
    assert {row["offload"] for row in plans} == {"none"}
    for row in plans:
        cut = 32 // row["micro_batch"]
        assert row["command"] == (
            "torchrun --nproc-per-node 4 -m dbkernels train dit --preset digits --batch-size 64 "
            f"--num-blocks {row['num_blocks']} --recompute {row['recompute']} "
            + f"--accumulate {cut} " * (cut > 1)
            + "--tensor-parallel 2 --shard"
            + " --sharing copies --block 0" * (row["num_blocks"] > 1)
        )
    lines = quick("500MiB", flags).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("one of 4 devices, 2 to a layer, parameters shared out, on cpu")
    assert "not by what the devices send each other" in lines
    assert not any("all blocks" in line and not line.startswith(" 1 ") for line in lines)


def test_plans_of_gpus_say_how_they_share_blocks_batches_and_layers(quick, monkeypatch):
    monkeypatch.setattr(meshes, "estimate", reckoned)
    outcome = quick("500MiB", "--gpus 8 --json")
    every = rows_of(outcome)
    assert {row["row"] for row in every} == {"limit", "plan"}
    assert all(row["gpus"] == 8 for row in every)
    plans = {row["num_blocks"]: row for row in every if row["row"] == "plan"}
    assert list(plans) and all(row["side_by_side"] >= 1 for row in plans.values())
    row = plans[4]
    assert (row["side_by_side"], row["data_parallel"], row["shard"]) == (4, 2, True)
    start = "torchrun --nproc-per-node 8 -m dbkernels train dit --preset digits --batch-size 64"
    assert row["command"].startswith(f"{start} --num-blocks 4 ")
    assert row["command"].endswith(" --shard --sharing copies")
    # of twelve blocks four are trained at once
    start = "torchrun --nproc-per-node 2 -m dbkernels train dit"
    assert plans[12]["side_by_side"] == 4 and plans[12]["command"].startswith(start)
    assert plans[12]["command"].endswith(" --shard --sharing copies --block 0")
    text = quick("500MiB", "--gpus 8").out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert lines[0] == "dit digits, batch 64, float32 compute, on 8 x cpu, each with 500 MiB"
    assert "Largest preset" not in text and "not by what the devices send each other" in lines
    cells = [line.split("│") for line in lines if line.startswith(" 12 ")]
    assert [cell.strip() for cell in cells[0][:4]] == ["12", "4", "2", "1"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--gpus 0", "gpus must be at least 1, got 0"),
        ("--gpus 2 --shard", "must be left out with gpus, got 1, 1 and True"),
        ("--gpus 2 --data-parallel 2", "must be left out with gpus, got 2, 1 and False"),
        ("--gpus 2 --memory 1MiB", "at batch 64 on 2 devices, got 1.00 MiB: that is its smallest"),
    ],
)
def test_rejects_what_gpus_cannot_do(flags, message, quick, monkeypatch):
    monkeypatch.setattr(meshes, "estimate", reckoned)
    outcome = quick("500MiB", flags)
    assert outcome.code == 1 and message in " ".join(outcome.err.split())


def test_a_batch_that_nobody_gives_is_a_multiple_of_the_gpus(cli, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(meshes, "estimate", reckoned)
    rows = rows_of(cli("plan --family dit --memory 100GiB --target cpu --gpus 6 --json"))
    assert {row["batch"] for row in rows} == {132}


def test_a_memory_that_nothing_fits_gets_the_smallest_plan_and_what_would_fit(quick, monkeypatch):
    # a layer of 30 MiB with 1 of activations, the head with 16, and 1 that the allocator holds
    message = (
        "error: memory must be at least 560 MiB for dit XL/2 at batch 32, got 50.0 MiB: that is "
        "its smallest plan, num_blocks 28, offload cpu, recompute layer, micro-batch 1; "
        "no preset of the family fits\n"
    )
    flags = "--preset XL/2 --batch 32 --target h100"
    outcome = quick("50MiB", flags)
    assert (outcome.code, outcome.out) == (1, "") and outcome.err.endswith(f"\n{message}")
    assert outcome.err.count("nothing fits\n") == len(module.counts_of(28))
    assert quick("559MiB", flags).code == 1
    outcome = quick("560MiB", flags)
    assert outcome.out.startswith("dit XL/2, batch 32, float32 compute, on h100 with 560 MiB\n")
    assert "512 MiB are left to CUDA's context" in outcome.out
    monkeypatch.setattr(module, "estimate", wide)
    outcome = quick("800MiB", "--preset XL/2")
    assert "; the largest preset of the family that fits is B/2" in outcome.err


@pytest.mark.parametrize(
    ("flags", "family", "batch"),
    [
        ({}, "vit", 128),
        ({"preset": "XL/2"}, "dit", 128),
        # 4,096 patches and 512 tokens of text
        ({"preset": "flux-12b"}, "mmdit", 4),
        ({"preset": "flux-12b", "batch": 16}, "mmdit", 16),
        ({"family": "mdm", "preset": "small"}, "mdm", 128),
    ],
    ids=str,
)
def test_the_family_and_the_batch_follow_the_preset(flags, family, batch):
    recipe = Plan(memory="1GiB", **flags).recipe(TARGETS["h100"])
    assert (recipe.family, recipe.batch_size) == (family, batch)


def test_adapters_are_of_the_plans_and_of_their_commands(cli, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    flags = "--lora 4 --lora-base bfloat16 --batch 2 --target cpu"
    every = rows_of(cli(f"plan --preset digits --memory 1GiB {flags} --json"))
    assert all((row["lora"], row["lora_base"]) == (4, "bfloat16") for row in every)
    whole, *_ = every
    # two moments of the adapters alone, beside two bytes of each number that is frozen
    assert 0 < whole["by_category"]["optimizer"] < whole["by_category"]["parameters"] / 5
    commands = [row["command"] for row in every if row["row"] == "plan"]
    assert commands and all(
        command.endswith("--from NETWORK --lora 4 --lora-base bfloat16") for command in commands
    )
