from types import SimpleNamespace

import pytest
import torch
from training.tiny import make_trainer

from dbkernels.memory.measure import MEASURED
from dbkernels.training import performance
from dbkernels.training.performance import profile_trainer


def test_the_costliest_blocks_peak_and_the_time_of_all():
    trainer = make_trainer("dit", num_blocks=2, steps=100)
    row = profile_trainer(trainer, steps=1)
    assert row["device"] == "cpu" and set(row["by_category"]) == set(MEASURED)
    assert sum(row["by_category"].values()) == row["peak_bytes"] > row["saved_bytes"] > 0
    assert row["seconds_per_sweep"] == pytest.approx(2 * row["seconds_per_step"])
    assert row["allocated_bytes"] is None and row["reserved_bytes"] is None
    # two of three layers
    weights = sum(p.nbytes for p in trainer.models.parameters())
    assert row["by_category"]["parameters"] >= weights


def test_every_block_is_warmed_up_timed_and_measured():
    trainer = make_trainer(num_blocks=3, steps=100)
    profile_trainer(trainer, steps=4)
    # two to warm up, four timed, one for the allocator's peak and one for the tracker's
    own = {part.steps for name, part in trainer.parts.items() if name != "shared"}
    assert own == {2 + 4 + 1}


def test_a_gpus_allocator_is_asked_without_the_tracker(monkeypatch):
    calls = []
    answers = {"max_memory_allocated": 111, "max_memory_reserved": 222}
    for name in ("synchronize", "reset_peak_memory_stats", *answers):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: calls.append(name) or answers.get(name)
        )
    gpu = SimpleNamespace(type="cuda")
    assert performance._allocated(lambda: calls.append("step"), gpu) == (111, 222)
    assert calls[:4] == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]


def test_blocks_that_visit_the_device_are_measured_there():
    trainer = make_trainer("dit", steps=100, resident="block")
    row = profile_trainer(trainer, steps=1)
    # on a CPU the blocks at rest are there too, beside the room for the one that is trained
    everything = make_trainer("dit", steps=100)
    tensors = [t for part in everything.parts.values() for t in part.tensors()]
    assert row["peak_bytes"] > sum(tensor.nbytes for tensor in tensors)
    assert {part.steps for name, part in trainer.parts.items() if name != "shared"} == {4}
