import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.tiny import equal, make_trainer

from dbkernels.training.offload.memory import CpuMemory, flat_bytes
from dbkernels.training.offload.offloader import Offloader, _Flat
from dbkernels.training.param_group import ParamGroup

SETTINGS = {"ema": 0.9, "warmup": 1, "decay": "cosine"}


def block_by_block(family="vit", tmp_path=None, **settings):
    where = {"offload": "cpu"}
    if tmp_path is not None:
        where = {"offload": "disk", "offload_dir": str(tmp_path / "off")}
    return make_trainer(family, **{**SETTINGS, **settings}, **where)


def steps(trainer, count=None):
    count = trainer.total_steps if count is None else count
    return [trainer.step_block(trainer.next_block()) for _ in range(count)]


def same(trainer, other):
    ours, theirs = trainer.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for group, expected in theirs.items():
        assert equal(ours[group], expected), group
    return trainer.counters() == other.counters()


def addresses(trainer, name):
    return [tensor.data_ptr() for tensor in trainer.groups[name].tensors()]


def slot_range(trainer, index=0):
    slot = trainer.offloader._slots[index]
    return range(slot.data_ptr(), slot.data_ptr() + slot.nbytes)


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
    swapped = block_by_block(family, tmp_path if disk else None, prefetch=prefetch, **common)
    assert steps(swapped) == steps(whole)
    assert same(swapped, whole)
    swapped.close()
    assert same(swapped, whole)


@pytest.mark.parametrize("prefetch", [False, True])
def test_gives_the_same_bits_when_the_blocks_come_in_another_order(prefetch):
    whole, swapped = make_trainer(**SETTINGS), block_by_block(prefetch=prefetch)
    for index in (2, 2, 0, 1, 0, 2, 1, 1, 0):
        row = whole.step_block(whole.blocks[index])
        assert swapped.step_block(swapped.blocks[index]) == row
    assert same(swapped, whole)


def test_blocks_of_equal_layers_have_the_same_addresses_at_every_turn():
    trainer = block_by_block()
    rows = {trainer.step_block(trainer.blocks[0])["block"]: addresses(trainer, "block0")}
    objects = {name: [id(t) for t in group.tensors()] for name, group in trainer.groups.items()}
    shared = addresses(trainer, "shared")
    for index in (1, 2, 0, 1, 2):
        trainer.step_block(trainer.blocks[index])
        rows[index] = addresses(trainer, f"block{index}")
        assert rows[index] == rows[0]
        assert addresses(trainer, "shared") == shared
    assert objects == {n: [id(t) for t in group.tensors()] for n, group in trainer.groups.items()}


def test_only_the_trained_block_lies_in_the_slot():
    trainer = block_by_block()
    for index in (1, 0, 2):
        trainer.step_block(trainer.blocks[index])
        for name in ("block0", "block1", "block2", "shared"):
            inside = {address in slot_range(trainer) for address in addresses(trainer, name)}
            assert inside == {name == f"block{index}"}


def test_the_slot_is_as_large_as_one_block_and_never_replaced():
    trainer = block_by_block()
    steps(trainer, 1)
    (slot,) = trainer.offloader._slots
    own = sum(-(-t.nbytes // 512) * 512 for t in trainer.groups["block0"].tensors())
    assert slot.nbytes == own
    homes = [flat.home.nbytes for flat in trainer.offloader._blocks.values()]
    assert homes == [own] * 3
    address = slot.data_ptr()
    steps(trainer, 5)
    assert [slot.data_ptr() for slot in trainer.offloader._slots] == [address]


def frozen_addresses(trainer, name):
    return [parameter.data_ptr() for parameter in trainer.blocks.frozen()[name]]


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_frozen_layers_travel_with_their_block(tmp_path, disk, prefetch):
    whole = make_trainer(frozen="mlp", **SETTINGS)
    where = tmp_path if disk else None
    swapped = block_by_block(tmp_path=where, prefetch=prefetch, frozen="mlp")
    for index in (1, 0, 2, 2, 1):
        row = whole.step_block(whole.blocks[index])
        assert swapped.step_block(swapped.blocks[index]) == row
        for name in ("block0", "block1", "block2"):
            lies = slot_range(swapped, swapped.offloader.slot)
            inside = {address in lies for address in frozen_addresses(swapped, name)}
            assert inside == {name == f"block{index}"}
    assert same(swapped, whole)
    swapped.close()
    assert same(swapped, whole)


def test_what_is_frozen_is_never_copied_back():
    trainer = block_by_block(frozen="mlp")
    trainer.step_block(trainer.blocks[0])
    flat = trainer.offloader._blocks["block0"]
    frozen = flat_bytes(p.nbytes for p in trainer.blocks.frozen()["block0"])
    assert 0 < frozen == len(flat.home) - flat.updated_bytes
    flat.home[flat.updated_bytes :] = 7
    trainer.step_block(trainer.blocks[1])
    assert (flat.home[flat.updated_bytes :] == 7).all()


def test_prefetching_takes_a_second_slot_and_fills_it_before_the_turn():
    trainer = block_by_block(prefetch=True, order="sequential", steps=2)
    steps(trainer, 1)
    assert len(trainer.offloader._slots) == 2
    trainer.offloader.wait()
    # already there, although the block may be read and written at home until its turn
    (flat,) = [flat for name, flat in trainer.offloader._blocks.items() if name == "block1"]
    slot = trainer.offloader._slots[trainer.offloader._other_slot()]
    assert torch.equal(slot, flat.home)
    assert not any(a in slot_range(trainer, 0) for a in addresses(trainer, "block1"))
    assert not any(a in slot_range(trainer, 1) for a in addresses(trainer, "block1"))
    before = threading.active_count()
    steps(trainer, 2)
    assert threading.active_count() == before


def two_groups():
    """Blocks of unequal size, and a shared group."""
    models = nn.Module()
    models.small, models.large = nn.Linear(2, 2), nn.Linear(50, 40)
    models.shared = nn.Linear(3, 3)
    models.register_buffer("table", torch.randn(3))
    groups = {
        name: ParamGroup(dict(group.named_parameters()), total=1, weight_decay=0.0, ema=0.5)
        for name, group in models.named_children()
    }
    return models, groups


@pytest.fixture
def adopted():
    models, groups = two_groups()
    device = torch.device("cpu")
    offloader = Offloader(models, device, CpuMemory(device), prefetch=False)
    for name, group in groups.items():
        offloader.adopt(name, group)
    return offloader, groups


def test_the_slot_holds_the_largest_block(adopted):
    offloader, groups = adopted
    offloader.enter("small")
    with torch.no_grad():
        groups["small"].parameters["weight"].fill_(3.0)
    expected = [tensor.clone() for tensor in groups["large"].tensors()]
    offloader.enter("large")
    assert all(map(torch.equal, groups["large"].tensors(), expected))
    offloader.enter("small")
    assert (groups["small"].parameters["weight"] == 3.0).all()


def test_a_block_off_the_device_can_be_written(adopted):
    offloader, groups = adopted
    offloader.enter("small")
    with torch.no_grad():
        groups["large"].parameters["bias"].fill_(7.0)
    offloader.enter("large")
    assert (groups["large"].parameters["bias"] == 7.0).all()


def test_what_a_prefetched_slot_holds_is_dropped_when_all_is_settled():
    trainer = block_by_block(prefetch=True, order="sequential", steps=2)
    steps(trainer, 1)
    trainer.offloader.settle()
    with torch.no_grad():
        for parameter in trainer.groups["block1"].parameters.values():
            parameter.fill_(2.0)
    trainer.offloader.enter("block1")
    assert all((p == 2.0).all() for p in trainer.groups["block1"].parameters.values())


def test_leaves_alone_what_it_was_not_given(adopted):
    offloader, _ = adopted
    offloader.enter("unknown")
    assert offloader._slots == []


def test_entering_again_copies_nothing(adopted, monkeypatch):
    offloader, _ = adopted
    offloader.enter("small")
    monkeypatch.setattr(offloader, "_memory", None)
    offloader.enter("small")


def test_tensors_that_were_moved_meanwhile_are_refused(adopted):
    offloader, groups = adopted
    offloader.enter("small")
    weight = groups["large"].parameters["weight"]
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="the tensors of large must be where training left them"):
        offloader.enter("large")


def test_closing_frees_the_slot_and_a_step_opens_it_again():
    trainer, whole = block_by_block(), make_trainer(**SETTINGS)
    steps(trainer, 2)
    slot = weakref.ref(trainer.offloader._slots[0])
    trainer.close()
    gc.collect()
    assert slot() is None
    steps(trainer, 4)
    steps(whole, 6)
    assert same(trainer, whole)


def test_a_trainer_that_has_prefetched_restores_in_the_middle_of_a_turn():
    whole, first = (
        make_trainer(**SETTINGS, steps_per_swap=3),
        block_by_block(steps_per_swap=3, prefetch=True),
    )
    steps(whole)
    steps(first, 5)
    saved = {g: {k: v.clone() for k, v in t.items()} for g, t in first.tensors().items()}
    # one that has already trained something else, and prefetched it
    second = block_by_block(steps_per_swap=3, prefetch=True, seed=4)
    steps(second, 4)
    second.config, second.block_order = first.config, first.block_order
    second.restore(saved, first.counters())
    steps(second, 7)
    assert same(second, whole)


@pytest.mark.parametrize("trained", range(6, 9))
def test_what_was_prefetched_before_a_restore_is_not_trained_after_it(trained):
    whole, first = make_trainer(**SETTINGS), block_by_block()
    steps(whole)
    steps(first, 3)
    saved = {g: {k: v.clone() for k, v in t.items()} for g, t in first.tensors().items()}
    second = block_by_block(prefetch=True)
    steps(second, trained)
    second.restore(saved, first.counters())
    steps(second, 9)
    assert same(second, whole)


def test_a_block_on_its_way_off_the_device_is_waited_for_before_it_is_read():
    whole, swapped = make_trainer(**SETTINGS), block_by_block(prefetch=True)
    memory = swapped.offloader._memory
    store = memory.store

    def slow(slot, home):
        time.sleep(0.05)
        store(slot, home)

    memory.store = slow
    for index in (0, 1):
        assert swapped.step_block(swapped.blocks[index]) == whole.step_block(whole.blocks[index])
    assert same(swapped, whole)


def test_what_a_step_writes_is_copied_after_the_step(adopted, monkeypatch):
    offloader, _ = adopted
    submitted = []
    monkeypatch.setattr(
        offloader._copy_stream,
        "submit",
        lambda copy, after_steps=False: submitted.append((copy.func.__name__, after_steps)),
    )
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


def test_files_have_no_name_and_need_no_tidying(tmp_path):
    trainer = block_by_block(tmp_path=tmp_path)
    steps(trainer, 4)
    assert os.listdir(tmp_path / "off") == []


def test_an_error_while_copying_beside_the_steps_is_raised():
    trainer = block_by_block(prefetch=True, order="sequential", steps=2)

    def broken(home, slot):
        raise OSError("no such disk")

    steps(trainer, 1)
    trainer.offloader.wait()
    trainer.offloader._memory.load = broken
    with pytest.raises(OSError, match="no such disk"):
        steps(trainer, 4)


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
    whole, swapped = make_trainer(**SETTINGS), block_by_block(prefetch=prefetch)
    for trainer in (whole, swapped):
        trainer.step_block(trainer.blocks[0])
    with pytest.raises(KeyboardInterrupt):
        swapped.step_block(swapped.blocks[1])
    for index in (following, 1, 0):
        row = whole.step_block(whole.blocks[index])
        assert swapped.step_block(swapped.blocks[index]) == row
        slot = slot_range(swapped, swapped.offloader._slot)
        assert all(address in slot for address in addresses(swapped, f"block{index}"))
    assert same(swapped, whole)


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


def raising(error):
    def call(*_, **__):
        raise error

    return call
