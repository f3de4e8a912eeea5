import os
from types import SimpleNamespace

import pytest
import torch
from cli.runs import killed, process_id

from dbkernels.cli import profile_measured
from dbkernels.cli.preset_run import preset_run
from dbkernels.cli.profile_measured import KILLED, attempted, measured, taken
from dbkernels.cli.profile_rows import Case

CASE = Case("block_fused", 6, "qkv")
CPU = {"budget": 1.0, "steps": 1, "device": torch.device("cpu")}


@pytest.fixture
def config():
    return preset_run("vit", "digits", batch=4, autocast=False)


def test_a_case_has_a_process_of_its_own_also_after_one_that_was_killed(config, monkeypatch):
    monkeypatch.setattr(profile_measured, "taken", killed)
    assert measured(CASE, "none", config, **CPU) == {"not_measured": KILLED}
    monkeypatch.setattr(profile_measured, "taken", process_id)
    found = measured(CASE, "none", config, **CPU)
    assert found["case"] == CASE and found["process"] != os.getpid()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "CUDA out of memory. Tried"),
        (MemoryError("Unable to allocate 3 TiB"), "Unable to allocate 3 TiB"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't"), "can't"),
    ],
)
def test_a_case_without_memory_says_so(error, reason):
    assert attempted(raising(error)) == {"not_measured": reason}


@pytest.mark.parametrize("error", [RuntimeError("another"), ValueError("out of memory")])
def test_another_error_stays_one(error):
    with pytest.raises(type(error)):
        attempted(raising(error))


def raising(error):
    def work():
        raise error

    return work


def profiled(monkeypatch, size, **more):
    """Stands for training that found these figures, with so many samples at once."""

    def trainer_with(config, device, data, **ways):
        asked.append((config, data.batch(torch.arange(len(data)))["image"].shape, ways))
        return SimpleNamespace(micro_batch=SimpleNamespace(size=size))

    asked = []
    numbers = ("peak_bytes", "saved_bytes", "seconds_per_step", "seconds_per_sweep")
    others = {"device": "cuda", "by_category": {}, "first_step": None, "steady_step": None}
    monkeypatch.setattr(profile_measured, "trainer_with", trainer_with)
    monkeypatch.setattr(
        profile_measured,
        "profile_trainer",
        lambda trainer, steps: {**dict.fromkeys(numbers, 9), **others, **more},
    )
    return asked


def test_what_a_gpu_tells_stands_before_what_the_tracker_saw(config, monkeypatch):
    steady = {"allocated_bytes": 1, "reserved_bytes": 2}
    asked = profiled(monkeypatch, 4, steady_step=steady)
    found = taken(CASE, "cpu", config, **CPU)
    assert (found["measured_allocated_bytes"], found["measured_reserved_bytes"]) == (1, 2)
    assert found["steady_step"] == steady and found["measured_saved_bytes"] == 9
    ((config, shape, ways),) = asked
    assert config.trainer.offload == "cpu" and config.partition.num_blocks == 6
    assert config.model.recompute == "qkv" and shape == (4, 1, 8, 8)
    assert ways["baseline"] is None


def test_off_a_gpu_the_tracker_tells(config, monkeypatch):
    profiled(monkeypatch, 4)
    found = taken(CASE, "none", config, **CPU)
    assert (found["measured_allocated_bytes"], found["measured_reserved_bytes"]) == (9, 9)


def test_a_batch_that_ran_in_pieces_is_not_measured(config, monkeypatch):
    profiled(monkeypatch, 2)
    assert taken(CASE, "none", config, **CPU) == {
        "not_measured": "of a batch of 4 the device holds 2 samples at once"
    }
