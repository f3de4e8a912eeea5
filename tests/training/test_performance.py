from types import SimpleNamespace

import pytest
import torch
from training.tiny import make_trainer

from dbkernels.memory.device import DevicePeak
from dbkernels.memory.measure import MEASURED
from dbkernels.training import performance
from dbkernels.training.performance import profile_trainer


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
    own = {group.steps for name, group in trainer.groups.items() if name != "shared"}
    assert own == {2 + 4 + 1}


def test_a_gpu_tells_of_the_first_step_and_of_a_steady_one(monkeypatch):
    answers = iter([5, 3, 8, 4, 9, 1])

    def device_peak(step, device):
        step()
        return DevicePeak(next(answers), 0, 0, 0, None)

    monkeypatch.setattr(performance, "device_peak", device_peak)
    monkeypatch.setattr(performance, "measure_peak", lambda step, **_: SimpleNamespace(
        total_bytes=1, saved_bytes=1, by_category={}, at=""
    ))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trainer = make_trainer(num_blocks=3, steps=100)
    # the only device here, under another name
    monkeypatch.setattr(performance, "_on_gpu", lambda step, device: [device_peak(step, device)])
    row = profile_trainer(trainer, steps=1)
    assert row["first_step"]["allocated_bytes"] == 8
    assert row["steady_step"]["allocated_bytes"] == 9


def test_offloaded_blocks_are_measured_on_the_device():
    trainer = make_trainer("dit", steps=100, offload="cpu")
    row = profile_trainer(trainer, steps=1)
    # on a CPU the blocks off the device are there too, beside the room for the one that is trained
    everything = make_trainer("dit", steps=100)
    tensors = [t for group in everything.groups.values() for t in group.tensors()]
    assert row["peak_bytes"] > sum(tensor.nbytes for tensor in tensors)
    assert {group.steps for name, group in trainer.groups.items() if name != "shared"} == {4}
