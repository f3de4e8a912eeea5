"""Where blocks are, how steps are launched and when rows are read moves no bit of a run."""

import os

import pytest
import torch
from training.recorded import make_captured
from training.tiny import (
    CPU,
    IN_BACKWARD,
    PREFETCH,
    assert_holds,
    assert_same,
    assert_same_steps,
    augment,
    copies,
    families,
    make_trainer,
)

SCHEDULE = {"ema": 0.9, "warmup": 1, "decay": "cosine"}
ROUNDED, COPIES = {"accumulate": 2, "autocast": True}, {"sharing": "copies"}
DISK = {"offload": "disk"}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    here = request.param == "cpu"
    return torch.device("cpu") if here else request.getfixturevalue("gpu")


@pytest.mark.parametrize(
    "settings, way, captured",
    [
        (ROUNDED, {}, False),
        (IN_BACKWARD, {}, False),
        ({"clip": 1e-2}, {}, True),
        (COPIES | ROUNDED, {}, True),
        (IN_BACKWARD, {}, True),
        ({}, CPU, True),
        ({}, PREFETCH, True),
        ({}, CPU, False),
        ({"steps_per_swap": 3}, PREFETCH, False),
        (COPIES, PREFETCH, False),
        ({}, DISK, False),
        (COPIES | {"steps_per_swap": 3}, DISK, False),
        ({"steps_per_swap": 3}, PREFETCH | DISK, False),
        (COPIES, PREFETCH | DISK, False),
    ],
    ids=str,
)
@families
def test_steps_have_the_bits_of_plain_ones(tmp_path, device, family, settings, way, captured):
    if "disk" in way.values():
        way = {**way, "offload_dir": str(tmp_path / "off")}
    plain, recorder = make_trainer(family, device=device, **SCHEDULE, **settings), None
    if captured:
        trainer, recorder = make_captured(family, device=device, **SCHEDULE, **settings, **way)
    else:
        trainer = make_trainer(family, device=device, **SCHEDULE, **settings, **way)
    if device.type == "cpu":
        plain.augment = trainer.augment = augment
    # no order that could be foreseen, and that of the run
    assert_same_steps(trainer, plain, (2, 2, 0, 1, 0))
    assert_same_steps(trainer, plain)
    trainer.close()
    assert_same(trainer, plain)
    if recorder:
        assert recorder.warm + recorder.replayed == plain.step and recorder.replayed > 3
    if "disk" in way.values():
        assert os.listdir(tmp_path / "off") == []


@families
@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_in_the_backward_and_after_it_give_the_same_bits(family, sharing):
    settings = {**SCHEDULE, "sharing": sharing}
    after = make_trainer(family, clip=0.0, **settings)
    inside = make_trainer(family, **IN_BACKWARD, **settings)
    # the norm alone is summed up in another order
    assert_same_steps(inside, after, (0, 1, 0, 2, 1), rel=1e-5)
    assert all(p.grad is None for p in inside.blocks.parameters())


@pytest.mark.parametrize(
    "breaks, settings, captured",
    [
        ("gradient", {}, False),
        ("gradient", {}, True),
        ("loss", {}, False),
        ("loss", {}, True),
        ("loss", IN_BACKWARD, False),
        ("loss", IN_BACKWARD, True),
        ("loss", {"accumulate": 2}, False),
        ("loss", CPU, False),
    ],
    ids=str,
)
def test_nothing_launched_after_a_step_that_was_not_finite_updates_anything(
    device, breaks, settings, captured
):
    added, root = torch.zeros((), device=device), torch.ones((), device=device)

    def objective(blocks, block, batch, draw):
        # the square root of 0 has no slope that could be multiplied by 0
        nothing = (blocks.model.head.weight * 0 + root).sqrt().sum() * 0
        return blocks.loss(block, batch, draw) + nothing + added

    settings = {"device": device, "ema": 0.9, "objective": objective, **settings}
    whole, recorder = make_trainer("dit", **settings), None
    if captured:
        trainer, recorder = make_captured("dit", **settings)
    else:
        trainer = make_trainer("dit", **settings)
    # every block has had its first step, so that one which is captured is replayed
    first = [trainer.launch(trainer.next_block()) for _ in range(5)]
    before, counters, block = copies(trainer), trainer.counters(), trainer.next_block()
    added.fill_(torch.inf) if breaks == "loss" else root.zero_()
    broken = trainer.launch(block)
    added.zero_(), root.fill_(1)
    later = [trainer.launch(trainer.next_block()) for _ in range(2)]
    assert_holds(trainer, before)
    assert not recorder or recorder.replayed == 5
    for each in first:
        each.row()
        whole.step_block(whole.next_block())
    with pytest.raises(FloatingPointError, match="gradient norm nan in block"):
        later[1].row()
    where = f"in block {block.index} at its step {counters['groups'][f'block{block.index}']}"
    with pytest.raises(FloatingPointError, match=f"{where} .*; nothing was updated"):
        broken.row()
    assert trainer.counters() == counters
    assert_holds(trainer, before)
    assert_same_steps(trainer, whole)
