import json

import pytest
from cli.plans import in_turn, reckoned
from cli.runs import refused

import dbkernels.cli.plan_search as module


@pytest.fixture
def plan(cli, monkeypatch):
    monkeypatch.setattr(module, "_run", in_turn)

    def run(*flags):
        return cli("plan", *flags)

    return run


@pytest.fixture
def quick(plan, monkeypatch):
    monkeypatch.setattr(module, "estimate", reckoned)
    return plan


def test_a_plan_of_a_preset_is_a_command_that_train_takes(plan, cli):
    outcome = plan("--memory", "120 MiB", "--target", "cpu", "--batch", "4", "--json")
    every = [json.loads(line) for line in outcome.out.splitlines()]
    plans = [row for row in every if row["row"] == "plan"]
    assert outcome.code == 0
    assert len(plans) == 11
    assert plans[0]["relative_time"] == 1.0 and plans[0]["num_blocks"] == 1
    assert all(row["peak_reserved_bytes"] <= 120 * 2**20 for row in plans)
    assert every[-1]["largest"] == "cifar100"
    command = plans[-1]["command"].split()[3:]
    trained = cli(*command, "--steps", "1", "--data", "data.npz", "--out", "out", "--device", "cpu")
    assert trained.code == 0, trained.err


def test_the_screen_is_whole(quick):
    outcome = quick("--memory", "2GiB", "--family", "dit")
    assert outcome.code == 0
    assert outcome.out.startswith("dit digits, batch 128, float32 compute, on h100 with 2.00 GiB\n")
    assert "512 MiB are left to CUDA's context" in outcome.out


def test_a_memory_that_nothing_fits_gets_the_smallest_plan_and_what_it_needs(quick):
    # a layer of 30 MiB with 1 of activations, the head with 16, and 1 that the allocator holds
    message = (
        "memory must be at least 560 MiB for dit XL/2 at batch 32, got 50.0 MiB: that is its "
        "smallest plan, num_blocks 28, offload cpu, recompute layer, micro-batch 1; "
        "no preset of the family fits"
    )
    flags = ("--family", "dit", "--preset", "XL/2", "--batch", "32")
    outcome = quick(*flags, "--memory", "50MiB")
    assert outcome.code == 1 and outcome.err.splitlines()[-1] == f"error: {message}"
    assert outcome.out == ""
    assert quick(*flags, "--memory", "560MiB").code == 0


def test_a_smaller_preset_that_fits_is_named(quick, monkeypatch):
    def wide(setting, config, target):
        grown = config.model.dim * 2**20
        found = reckoned(setting, config, target)
        return {k: module.Estimate(**{**vars(v), "peak_bytes": grown}) for k, v in found.items()}

    monkeypatch.setattr(module, "estimate", wide)
    outcome = quick("--family", "dit", "--preset", "XL/2", "--memory", "800MiB", "--target", "cpu")
    assert "; the largest preset of the family that fits is B/2" in outcome.err


@pytest.mark.parametrize(
    "flags, message",
    [
        *(
            (["--memory", text], f"such as 24GiB, got {text}\n")
            for text in ("24GB", "24G", "a lot", "0", "0GiB", "24 Gib")
        ),
        (["--memory=-24GiB"], "memory must be a positive number and one of KiB, MiB, GiB, TiB"),
        (["--preset", "huge"], "preset of ViT must be one of cifar100, digits, got huge"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--target", "tpu"], "target must be one of cpu, a100, h100, h200, b200, got tpu"),
    ],
)
def test_rejects(quick, flags, message):
    memory = [] if "--memory" in flags[0] else ["--memory", "1GiB"]
    assert refused(quick(*memory, *flags), message)
