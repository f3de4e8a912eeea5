import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from training.tiny import make_trainer

from dbkernels.memory.measure import MEASURED
from dbkernels.planning import measure as module
from dbkernels.planning.measure import KILLED, attempted, figures_of, measured, profile_trainer
from dbkernels.planning.pool import results
from dbkernels.planning.recipe import of_preset

RECIPE = replace(
    of_preset("vit", "digits"), batch_size=4, num_blocks=6, recompute="qkv", offload="cpu"
)
CPU = torch.device("cpu")


def steps_of(trainer):
    return {group.steps for name, group in trainer.groups.items() if name != "shared"}


# a trainer's steps


def test_the_costliest_blocks_peak_and_the_time_of_all():
    trainer = make_trainer("dit", num_blocks=2, steps=100)
    row = profile_trainer(trainer, steps=1)
    assert row["device"] == "cpu" and set(row["by_category"]) == set(MEASURED)
    assert sum(row["by_category"].values()) == row["peak_bytes"] > row["saved_bytes"] > 0
    assert row["seconds_per_sweep"] == pytest.approx(2 * row["seconds_per_step"])
    assert row["first_step"] is None and row["steady_step"] is None
    # two of three layers
    weights = sum(p.nbytes for p in trainer.blocks.parameters())
    assert row["by_category"]["parameters"] >= weights


def test_every_block_is_warmed_up_timed_and_measured():
    trainer = make_trainer(num_blocks=3, steps=100)
    profile_trainer(trainer, steps=4)
    # two to warm up, four timed, one for the allocator's peak and one for the tracker's
    assert steps_of(trainer) == {2 + 4 + 1}


def test_a_gpu_tells_of_the_first_step_and_of_a_steady_one(monkeypatch):
    answers = iter([5, 3, 8, 4, 9, 1])

    def device_peak(step, device):
        step()
        return [{"allocated_bytes": next(answers)}]

    # the only device here, under another name
    monkeypatch.setattr(module, "_on_gpu", device_peak)
    trainer = make_trainer(num_blocks=3, steps=100)
    row = profile_trainer(trainer, steps=1)
    assert row["first_step"]["allocated_bytes"] == 8
    assert row["steady_step"]["allocated_bytes"] == 9
    assert steps_of(trainer) == {2 + 1 + 2}


def test_offloaded_blocks_are_measured_on_the_device():
    trainer = make_trainer("dit", steps=100, offload="cpu")
    row = profile_trainer(trainer, steps=1)
    # on a CPU the blocks off the device are there too, beside the room for the one that is trained
    everything = make_trainer("dit", steps=100)
    tensors = [t for group in everything.groups.values() for t in group.tensors()]
    assert row["peak_bytes"] > sum(tensor.nbytes for tensor in tensors)
    assert steps_of(trainer) == {4}


# a recipe's figures


@pytest.fixture
def profiled(monkeypatch):
    """Stands for training that finds these figures, with so many samples at once."""

    def found(size, **more):
        def trainer(recipe, device):
            asked.append(recipe)
            return SimpleNamespace(micro_batch=SimpleNamespace(size=size))

        asked = []
        numbers = ("peak_bytes", "saved_bytes", "seconds_per_step", "seconds_per_sweep")
        others = {"device": "cuda", "by_category": {}, "first_step": None, "steady_step": None}
        row = {**dict.fromkeys(numbers, 9), **others, **more}
        monkeypatch.setattr(module.Recipe, "trainer", trainer)
        monkeypatch.setattr(module, "profile_trainer", lambda trainer, steps: row)
        return figures_of(RECIPE, CPU, 1), asked

    return found


def test_what_a_gpu_tells_stands_before_what_the_tracker_saw(profiled):
    steady = {"allocated_bytes": 1, "reserved_bytes": 2}
    found, asked = profiled(4, steady_step=steady)
    assert (found["measured_allocated_bytes"], found["measured_reserved_bytes"]) == (1, 2)
    assert found["steady_step"] == steady and found["measured_saved_bytes"] == 9
    assert asked == [RECIPE]


def test_off_a_gpu_the_tracker_tells(profiled):
    found, _ = profiled(4)
    assert (found["measured_allocated_bytes"], found["measured_reserved_bytes"]) == (9, 9)


def test_a_batch_that_ran_in_pieces_is_not_measured(profiled):
    found, _ = profiled(2)
    assert found == {"not_measured": "of a batch of 4 the device holds 2 samples at once"}


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


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("Unable to allocate 3 TiB"), "Unable to allocate 3 TiB"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't"), "can't"),
        (RuntimeError("another"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_has_no_memory_says_so_and_another_error_stays_one(error, reason):
    if reason is None:
        with pytest.raises(type(error)):
            attempted(partial(raising, error))
    else:
        assert attempted(partial(raising, error)) == {"not_measured": reason}


@pytest.mark.parametrize("most", [1, 2])
def test_results_come_in_the_order_of_the_jobs(most, capsys):
    jobs = [partial(abs, -3), partial(pow, 2, 5), os.getpid]
    *found, process = results(jobs, "counting", most=most)
    assert found == [3, 32] and (process == os.getpid()) == (most == 1)
    assert capsys.readouterr() == ("", "")
