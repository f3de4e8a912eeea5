import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from training.tiny import make_trainer

from dbkernels.memory.measure import MEASURED
from dbkernels.planning import measure as module
from dbkernels.planning.measure import KILLED, figures_of, measured, profile_trainer
from dbkernels.planning.recipe import of_preset
from dbkernels.pool import results

RECIPE = replace(
    of_preset("vit", "digits"), batch_size=4, num_blocks=6, recompute="qkv", offload="cpu"
)
CPU = torch.device("cpu")


# a trainer's steps


def test_the_costliest_blocks_peak_and_the_time_of_all():
    trainer = make_trainer("dit", num_blocks=2, steps=100)
    row = profile_trainer(trainer, steps=3)
    assert row["device"] == "cpu" and set(row["measured_by_category"]) == set(MEASURED)
    peak = row["measured_allocated_bytes"]
    assert sum(row["measured_by_category"].values()) == peak > row["measured_saved_bytes"] > 0
    assert row["measured_reserved_bytes"] == peak
    assert row["seconds_per_sweep"] == pytest.approx(2 * row["seconds_per_step"])
    assert row["first_step"] is None and row["steady_step"] is None
    # two of three layers
    weights = sum(p.nbytes for p in trainer.blocks.parameters())
    assert row["measured_by_category"]["parameters"] >= weights
    # two to warm up, three timed, one for the allocator's peak and one for the tracker's
    assert {g.steps for name, g in trainer.groups.items() if name != "shared"} == {2 + 3 + 2}


def test_what_a_gpu_tells_of_the_first_and_of_a_steady_step_stands_before_the_tracker(monkeypatch):
    answers = iter([5, 3, 8, 4, 9, 1])

    def device_peak(step, device):
        step()
        peak = next(answers)
        return {"allocated_bytes": peak, "reserved_bytes": 2 * peak}

    # the only device here, under another name
    monkeypatch.setattr(module, "_allocated", device_peak)
    row = profile_trainer(make_trainer(num_blocks=3, steps=100), steps=1)
    assert row["first_step"] == {"allocated_bytes": 8, "reserved_bytes": 16}
    assert row["steady_step"] == {"allocated_bytes": 9, "reserved_bytes": 18}
    assert (row["measured_allocated_bytes"], row["measured_reserved_bytes"]) == (9, 18)


def test_offloaded_blocks_are_measured_on_the_device():
    trainer = make_trainer("dit", steps=100, offload="cpu")
    row = profile_trainer(trainer, steps=1)
    # on a CPU the blocks off the device are there too, beside the room for the one that is trained
    everything = make_trainer("dit", steps=100)
    tensors = [t for group in everything.groups.values() for t in group.tensors()]
    assert row["measured_allocated_bytes"] > sum(tensor.nbytes for tensor in tensors)


# a recipe's figures


@pytest.mark.parametrize(
    "outcome, found",
    [
        (4, {"measured": 9}),
        (2, {"not_measured": "of a batch of 4 the device holds 2 samples at once"}),
        (MemoryError("no 3 TiB"), {"not_measured": "no 3 TiB"}),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't"), {"not_measured": "can't"}),
        (RuntimeError("another"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_has_no_room_says_so_and_another_error_stays_one(monkeypatch, outcome, found):
    def trainer(recipe, device):
        assert (recipe, device) == (RECIPE, CPU)
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(micro_batch=SimpleNamespace(size=outcome))

    monkeypatch.setattr(module.Recipe, "trainer", trainer)
    monkeypatch.setattr(module, "profile_trainer", lambda trainer, steps: {"measured": 9})
    with nullcontext() if found else pytest.raises(type(outcome)):
        assert figures_of(RECIPE, CPU, 1) == found


# processes


def process_of(recipe, device, steps):
    return {"recipe": recipe, "process": os.getpid()}


def killed(recipe, device, steps):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_recipe_has_a_process_of_its_own_also_after_one_that_was_killed(monkeypatch):
    monkeypatch.setattr(module, "figures_of", killed)
    assert measured(RECIPE, CPU, 1) == {"not_measured": KILLED}
    monkeypatch.setattr(module, "figures_of", process_of)
    found = measured(RECIPE, CPU, 1)
    assert found["recipe"] == RECIPE and found["process"] != os.getpid()


@pytest.mark.parametrize("most", [1, 2])
def test_results_come_in_the_order_of_the_jobs(most, capsys):
    jobs = [partial(abs, -3), partial(pow, 2, 5), os.getpid]
    *found, process = results(jobs, most=most)
    assert found == [3, 32] and (process == os.getpid()) == (most == 1)
    assert capsys.readouterr() == ("", "")
