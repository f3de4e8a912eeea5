import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.bits import assert_same, assert_same_steps, copies
from training.tiny import make_trainer

from dbkernels.training.offload.memory import CpuMemory, flat_bytes
from dbkernels.training.offload.offloader import Offloader, _Flat
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer_config import TrainerConfig

SETTINGS = {"ema": 0.9, "warmup": 1, "decay": "cosine"}
SEQUENTIAL = {"prefetch": True, "order": "sequential", "steps": 2}
BLOCKS = ("block0", "block1", "block2")


def swapping(family="vit", folder=None, **settings):
    """A trainer whose blocks are in host memory, or on disk where a folder is given."""
    where = {"offload": "cpu"}
    if folder is not None:
        where = {"offload": "disk", "offload_dir": str(folder / "off")}
    return make_trainer(family, **{**SETTINGS, **settings}, **where)


def step(trainer, count):
    for _ in range(count):
        trainer.step_block(trainer.next_block())


def addresses(trainer, name):
    return [tensor.data_ptr() for tensor in trainer.groups[name].tensors()]


def in_slot(trainer, pointers, index=None):
    """Whether addresses lie in a slot, that of the current block where none is named."""
    slot = trainer.offloader._slots[trainer.offloader.slot if index is None else index]
    inside = {0 <= each - slot.data_ptr() < slot.nbytes for each in pointers}
    assert len(inside) == 1
    return inside == {True}


# the bits of a run whose blocks all stay on the device


@pytest.mark.parametrize(
    "family, sharing, steps_per_swap, disk, prefetch",
    [
        ("vit", "joint", 1, False, False),
        ("vit", "joint", 3, True, True),
        ("vit", "copies", 1, False, True),
        ("dit", "joint", 3, False, True),
        ("dit", "joint", 1, True, False),
        ("dit", "copies", 3, True, False),
        ("dit", "copies", 1, True, True),
    ],
)
def test_gives_the_bits_of_a_run_without_offload(
    tmp_path, family, sharing, steps_per_swap, disk, prefetch
):
    common = {"sharing": sharing, "steps_per_swap": steps_per_swap}
    whole = make_trainer(family, **SETTINGS, **common)
    swapped = swapping(family, tmp_path if disk else None, prefetch=prefetch, **common)
    assert_same_steps(swapped, whole)
    swapped.close()
    assert_same(swapped, whole)
    if disk:
        assert os.listdir(tmp_path / "off") == []


@pytest.mark.parametrize("prefetch", [False, True])
def test_gives_the_same_bits_when_the_blocks_come_in_another_order(prefetch):
    whole, swapped = make_trainer(**SETTINGS), swapping(prefetch=prefetch)
    assert_same_steps(swapped, whole, (2, 2, 0, 1, 0, 2, 1, 1, 0))


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_frozen_layers_travel_with_their_block(tmp_path, disk, prefetch):
    whole = make_trainer(frozen="mlp", **SETTINGS)
    swapped = swapping(folder=tmp_path if disk else None, prefetch=prefetch, frozen="mlp")
    for index in (1, 0, 2, 2, 1):
        assert_same_steps(swapped, whole, [index])
        for name in BLOCKS:
            frozen = [parameter.data_ptr() for parameter in swapped.blocks.frozen()[name]]
            assert in_slot(swapped, frozen) == (name == f"block{index}")
    swapped.close()
    assert_same(swapped, whole)


def test_what_is_frozen_is_never_copied_back():
    trainer = swapping(frozen="mlp")
    trainer.step_block(trainer.blocks[0])
    flat = trainer.offloader._blocks["block0"]
    frozen = flat_bytes(p.nbytes for p in trainer.blocks.frozen()["block0"])
    assert 0 < frozen == len(flat.home) - flat.updated_bytes
    flat.home[flat.updated_bytes :] = 7
    trainer.step_block(trainer.blocks[1])
    assert (flat.home[flat.updated_bytes :] == 7).all()


def test_closing_frees_the_slot_and_a_step_opens_it_again():
    trainer, whole = swapping(), make_trainer(**SETTINGS)
    assert_same_steps(trainer, whole, (0, 1))
    slot = weakref.ref(trainer.offloader._slots[0])
    trainer.close()
    gc.collect()
    assert slot() is None
    assert_same_steps(trainer, whole, (1, 2, 0, 0))


def test_a_trainer_that_has_prefetched_restores_in_the_middle_of_a_turn():
    whole, first = (
        make_trainer(**SETTINGS, steps_per_swap=3),
        swapping(steps_per_swap=3, prefetch=True),
    )
    step(whole, 12)
    step(first, 5)
    # one that has already trained something else, and prefetched it
    second = swapping(steps_per_swap=3, prefetch=True, seed=4)
    step(second, 4)
    second.config, second.block_order = first.config, first.block_order
    second.restore(copies(first), first.counters())
    step(second, 7)
    assert_same(second, whole)


@pytest.mark.parametrize("trained", range(6, 9))
def test_what_was_prefetched_before_a_restore_is_not_trained_after_it(trained):
    whole, first, second = make_trainer(**SETTINGS), swapping(), swapping(prefetch=True)
    step(whole, 12)
    step(first, 3)
    step(second, trained)
    second.restore(copies(first), first.counters())
    step(second, 9)
    assert_same(second, whole)


def test_a_block_on_its_way_off_the_device_is_waited_for_before_it_is_read():
    whole, swapped = make_trainer(**SETTINGS), swapping(prefetch=True)
    memory = swapped.offloader._memory
    store = memory.store

    def slow(slot, home):
        time.sleep(0.05)
        store(slot, home)

    memory.store = slow
    assert_same_steps(swapped, whole, (0, 1))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("following", [0, 1, 2])
@pytest.mark.parametrize("call", [2, 3], ids=["while one leaves", "while one enters"])
def test_a_swap_that_was_cut_short_loses_nothing(monkeypatch, call, following, prefetch):
    inner, calls = _Flat.lie_in, []

    def lie_in(flat, buffer):
        calls.append(flat)
        if len(calls) == call:
            inner(SimpleNamespace(tensors=flat.tensors[:5]), buffer)
            raise KeyboardInterrupt
        inner(flat, buffer)

    monkeypatch.setattr(_Flat, "lie_in", lie_in)
    whole, swapped = make_trainer(**SETTINGS), swapping(prefetch=prefetch)
    for trainer in (whole, swapped):
        trainer.step_block(trainer.blocks[0])
    with pytest.raises(KeyboardInterrupt):
        swapped.step_block(swapped.blocks[1])
    for index in (following, 1, 0):
        assert_same_steps(swapped, whole, [index])
        assert in_slot(swapped, addresses(swapped, f"block{index}"))


# where blocks lie


def test_only_the_trained_block_lies_in_the_slot_and_at_the_same_addresses_at_every_turn():
    trainer, seen = swapping(), []
    objects = {name: [id(t) for t in group.tensors()] for name, group in trainer.groups.items()}
    for index in (0, 1, 2, 0, 1, 2):
        trainer.step_block(trainer.blocks[index])
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


def test_prefetching_takes_a_second_slot_and_fills_it_before_the_turn():
    trainer = swapping(**SEQUENTIAL)
    step(trainer, 1)
    offloader = trainer.offloader
    assert len(offloader._slots) == 2
    offloader.wait()
    # already there, although the block may be read and written at home until its turn
    assert torch.equal(offloader._slots[offloader._other_slot()], offloader._blocks["block1"].home)
    assert not any(in_slot(trainer, addresses(trainer, "block1"), index) for index in (0, 1))
    before = threading.active_count()
    step(trainer, 2)
    assert threading.active_count() == before


def test_what_a_prefetched_slot_holds_is_dropped_when_all_is_settled():
    trainer = swapping(**SEQUENTIAL)
    step(trainer, 1)
    trainer.offloader.settle()
    with torch.no_grad():
        for parameter in trainer.groups["block1"].parameters.values():
            parameter.fill_(2.0)
    trainer.offloader.enter("block1")
    assert all((p == 2.0).all() for p in trainer.groups["block1"].parameters.values())


def test_an_error_while_copying_beside_the_steps_is_raised():
    trainer = swapping(**SEQUENTIAL)
    step(trainer, 1)
    trainer.offloader.wait()
    trainer.offloader._memory.load = raising(OSError("no such disk"))
    with pytest.raises(OSError, match="no such disk"):
        step(trainer, 4)


def raising(error):
    def call(*_, **__):
        raise error

    return call


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
    offloader.enter("small")
    with torch.no_grad():
        groups["small"].parameters["weight"].fill_(3.0)
        groups["large"].parameters["bias"].fill_(7.0)
    expected = [tensor.clone() for tensor in groups["large"].tensors()]
    offloader.enter("large")
    assert all(map(torch.equal, groups["large"].tensors(), expected))
    offloader.enter("small")
    assert (groups["small"].parameters["weight"] == 3.0).all()
    # entering again copies nothing
    monkeypatch.setattr(offloader, "_memory", None)
    offloader.enter("small")


def test_leaves_alone_what_it_was_not_given(adopted):
    offloader, _ = adopted
    offloader.enter("unknown")
    assert offloader._slots == []


def test_tensors_that_were_moved_meanwhile_are_refused(adopted):
    offloader, groups = adopted
    offloader.enter("small")
    weight = groups["large"].parameters["weight"]
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="the tensors of large must be where training left them"):
        offloader.enter("large")


def test_what_a_step_writes_is_copied_after_the_step(adopted, monkeypatch):
    offloader, _ = adopted
    submitted = []

    def submit(copy, after_steps=False):
        submitted.append((copy.func.__name__, after_steps))

    monkeypatch.setattr(offloader._copy_stream, "submit", submit)
    for name in ("small", "large"):
        offloader.enter(name)
    assert submitted == [("load", False), ("store", True), ("load", False)]


def test_times_the_way_off_the_device_and_back(adopted):
    offloader, groups = adopted
    offloader.enter("large")
    before = [tensor.clone() for tensor in groups["large"].tensors()]
    assert 0 < offloader.swap_seconds() < 1
    assert all(map(torch.equal, groups["large"].tensors(), before))
    assert offloader._current == "large"


def test_what_was_moved_to_the_device_leaves_it_where_no_room_was_left_for_a_slot(
    adopted, monkeypatch
):
    offloader, _ = adopted
    moves = []
    monkeypatch.setattr(offloader, "_move_common", moves.append)
    monkeypatch.setattr("torch.empty", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        offloader.enter("small")
    offloader.close()
    assert moves == [torch.device("cpu"), "cpu"]
