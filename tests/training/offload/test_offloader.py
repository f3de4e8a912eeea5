import gc
import threading
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from training.tiny import CPU, PREFETCH, assert_same, assert_same_steps, make_trainer, steps

from dbkernels.training.offload.memory import CpuMemory, flat_bytes
from dbkernels.training.offload.offloader import Offloader, _Flat
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer_config import TrainerConfig

SEQUENTIAL = {**PREFETCH, "order": "sequential", "steps": 2}
BLOCKS = ("block0", "block1", "block2")
places = pytest.mark.parametrize("settings", [CPU, PREFETCH], ids=["between", "beside"])


def pair(**settings):
    """A trainer whose blocks are swapped, and the same with all on the device."""
    whole = {k: v for k, v in settings.items() if k not in PREFETCH}
    return make_trainer(ema=0.9, **settings), make_trainer(ema=0.9, **whole)


def addresses(trainer, name):
    return [tensor.data_ptr() for tensor in trainer.groups[name].tensors()]


def in_slot(trainer, pointers):
    """Whether addresses lie in the slot of the current block."""
    slot = trainer.offloader._slots[trainer.offloader.slot]
    inside = {0 <= each - slot.data_ptr() < slot.nbytes for each in pointers}
    assert len(inside) == 1
    return inside == {True}


# the bits of a run whose blocks all stay on the device


@places
def test_frozen_layers_travel_with_their_block_and_are_never_copied_back(settings):
    swapped, whole = pair(frozen="mlp", **settings)
    for index in (1, 0, 2, 2, 1):
        assert_same_steps(swapped, whole, [index])
        for name in BLOCKS:
            frozen = [parameter.data_ptr() for parameter in swapped.blocks.frozen()[name]]
            assert in_slot(swapped, frozen) == (name == f"block{index}")
    flat = swapped.offloader._blocks["block1"]
    frozen = flat_bytes(p.nbytes for p in swapped.blocks.frozen()["block1"])
    assert 0 < frozen == len(flat.home) - flat.updated_bytes
    before = flat.home[flat.updated_bytes :].clone()
    flat.home[flat.updated_bytes :] = 7
    steps(swapped, [2])
    swapped.offloader.settle()
    assert (flat.home[flat.updated_bytes :] == 7).all()
    flat.home[flat.updated_bytes :] = before
    steps(whole, [2])
    swapped.close()
    assert_same(swapped, whole)


def test_closing_frees_the_slot_and_a_step_opens_it_again():
    trainer, whole = pair(**CPU)
    assert_same_steps(trainer, whole, (0, 1))
    slot = weakref.ref(trainer.offloader._slots[0])
    trainer.close()
    gc.collect()
    assert slot() is None
    assert_same_steps(trainer, whole, (1, 2, 0, 0))


@places
@pytest.mark.parametrize("following", [0, 1, 2])
@pytest.mark.parametrize("call", [2, 3], ids=["while one leaves", "while one enters"])
def test_a_swap_that_was_cut_short_loses_nothing(monkeypatch, call, following, settings):
    inner, calls = _Flat.lie_in, []

    def lie_in(flat, buffer):
        calls.append(flat)
        if len(calls) == call:
            inner(SimpleNamespace(tensors=flat.tensors[:5]), buffer)
            raise KeyboardInterrupt
        inner(flat, buffer)

    swapped, whole = pair(**settings)
    monkeypatch.setattr(_Flat, "lie_in", lie_in)
    assert_same_steps(swapped, whole, [0])
    with pytest.raises(KeyboardInterrupt):
        steps(swapped, [1])
    for index in (following, 1, 0):
        assert_same_steps(swapped, whole, [index])
        assert in_slot(swapped, addresses(swapped, f"block{index}"))


# where blocks lie


def test_only_the_trained_block_lies_in_the_slot_and_at_the_same_addresses_at_every_turn():
    trainer, seen = make_trainer(**CPU), []
    objects = {name: [id(t) for t in group.tensors()] for name, group in trainer.groups.items()}
    for index in (0, 1, 2, 0, 1, 2):
        steps(trainer, [index])
        for name in (*BLOCKS, "shared"):
            assert in_slot(trainer, addresses(trainer, name)) == (name == f"block{index}")
        seen.append((addresses(trainer, f"block{index}"), addresses(trainer, "shared")))
        # never replaced
        (slot,) = trainer.offloader._slots
        assert seen[-1] == seen[0] and slot.data_ptr() == seen[0][0][0]
    assert objects == {n: [id(t) for t in group.tensors()] for n, group in trainer.groups.items()}
    own = sum(-(-t.nbytes // 512) * 512 for t in trainer.groups["block0"].tensors())
    homes = [flat.home.nbytes for flat in trainer.offloader._blocks.values()]
    assert [slot.nbytes, *homes] == [own] * 4


def test_prefetching_fills_a_second_slot_before_the_turn_and_drops_it_when_all_is_settled():
    trainer = make_trainer(**SEQUENTIAL)
    offloader, group = trainer.offloader, trainer.groups["block1"]
    trainer.step_block(trainer.next_block())
    offloader.wait()
    # already there, although the block may be read and written at home until its turn
    slots, home = offloader._slots, offloader._blocks["block1"].home
    assert len(slots) == 2 and any(torch.equal(slot[: len(home)], home) for slot in slots)
    assert addresses(trainer, "block1")[0] == home.data_ptr()
    before = threading.active_count()
    offloader.settle()
    with torch.no_grad():
        for parameter in group.parameters.values():
            parameter.fill_(2.0)
    offloader.enter("block1")
    assert all((parameter == 2.0).all() for parameter in group.parameters.values())
    assert threading.active_count() == before


def test_an_error_while_copying_beside_the_steps_is_raised():
    trainer = make_trainer(**SEQUENTIAL)
    trainer.step_block(trainer.next_block())
    trainer.offloader.wait()
    trainer.offloader._memory.load = Mock(side_effect=OSError("no such disk"))
    with pytest.raises(OSError, match="no such disk"):
        trainer.run()


# an offloader without a trainer


@pytest.fixture
def adopted():
    """An offloader of blocks of unequal size and a shared group; and the groups."""
    models = nn.Module()
    models.small, models.large = nn.Linear(2, 2), nn.Linear(50, 40)
    models.shared = nn.Linear(3, 3)
    models.register_buffer("table", torch.randn(3))
    device = torch.device("cpu")
    offloader, groups = Offloader(models, device, CpuMemory(device), prefetch=False), {}
    config = TrainerConfig(steps=1, weight_decay=0.0, ema=0.5)
    for name, child in models.named_children():
        parameters = dict(child.named_parameters())
        groups[name] = ParamGroup(parameters, config, total=1)
        offloader.adopt(name, groups[name])
    return offloader, groups


def test_the_slot_holds_the_largest_block_and_those_at_home_can_be_written(adopted, monkeypatch):
    offloader, groups = adopted
    offloader.enter("unknown")
    assert offloader._slots == []
    offloader.enter("small")
    with torch.no_grad():
        groups["small"].parameters["weight"].fill_(3.0)
        groups["large"].parameters["bias"].fill_(7.0)
    expected = [tensor.clone() for tensor in groups["large"].tensors()]
    offloader.enter("large")
    assert 0 < offloader.swap_seconds() < 1
    assert all(map(torch.equal, groups["large"].tensors(), expected))
    offloader.enter("small")
    assert (groups["small"].parameters["weight"] == 3.0).all()
    # entering again copies nothing
    monkeypatch.setattr(offloader, "_memory", None)
    offloader.enter("small")


def test_tensors_that_were_moved_meanwhile_are_refused(adopted):
    offloader, groups = adopted
    offloader.enter("small")
    weight = groups["large"].parameters["weight"]
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="the tensors of large must be where training left them"):
        offloader.enter("large")


def test_what_was_moved_to_the_device_leaves_it_where_no_room_was_left_for_a_slot(
    adopted, monkeypatch
):
    offloader, _ = adopted
    moves = []
    monkeypatch.setattr(offloader, "_move_common", moves.append)
    monkeypatch.setattr("torch.empty", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        offloader.enter("small")
    offloader.close()
    assert moves == [torch.device("cpu"), "cpu"]
