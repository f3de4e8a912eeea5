"""No memory is read before it is written, nor written before it is read, on a GPU's streams."""

from functools import partial

import pytest
import torch
from training.races import Inline, Machine
from training.tiny import make_trainer

import dbkernels.training.offload.memory as memory_module
import dbkernels.training.offload.rest_file as rest_file
from dbkernels.training.offload.copy_stream import CopyStream
from dbkernels.training.offload.memory import DiskMemory
from dbkernels.training.offload.offloader import Offloader
from dbkernels.training.offload.rest_file import RestFile

CUDA = torch.device("cuda")


@pytest.fixture
def races(monkeypatch, tmp_path):
    """Races of a run whose copies go as on a GPU, where something is changed."""
    machine = Machine()
    machine.install(monkeypatch)
    # a few pieces to a block, so that both of the staging buffers are used again
    monkeypatch.setattr(rest_file, "STAGING_BYTES", 2**14)

    def run(change, prefetch, disk):
        where = {"offload": "disk", "offload_dir": str(tmp_path)} if disk else {"offload": "cpu"}
        trainer = make_trainer(prefetch=prefetch, ema=0.9, **where)
        offloader = trainer.offloader
        offloader._copy_stream = CopyStream(CUDA, beside=prefetch)
        if prefetch:
            offloader._copy_stream._thread = Inline(machine)
        machine.watch_host(*(flat.home for flat in offloader._blocks.values()))
        if disk:
            staging = offloader._memory._staging
            machine.watch_host(*staging._buffers)
            staging._read = [machine.Event(), machine.Event()]
            watch_files(machine, offloader, monkeypatch)
        machine.deaf = change(monkeypatch)
        with machine:
            go(trainer, machine)
        return machine.races

    return run


def watch_files(machine, offloader, monkeypatch):
    """Have the host's access to files, which is no op, be one to the buffers that they are."""
    files = offloader._memory._files
    homes = {files[f.home.data_ptr()]: f.home for f in offloader._blocks.values()}
    write, read = RestFile.write, RestFile._read

    def written(rest, piece, first):
        machine._run([piece], [homes[rest]], by_host=True)
        write(rest, piece, first)

    def filled(rest, piece, first):
        machine._run([homes[rest]], [piece], by_host=True)
        read(rest, piece, first)

    monkeypatch.setattr(RestFile, "write", written)
    monkeypatch.setattr(RestFile, "_read", filled)


def go(trainer, machine):
    """Steps, a look at all tensors as a checkpoint takes it, a timed swap, and an end, twice."""
    for _ in range(2):
        for _ in range(4):
            block = trainer.next_block()
            trainer.launch(block)
        machine.read_on_host(t for group in trainer.tensors().values() for t in group.values())
        trainer.offloader.swap_seconds()
        trainer.launch(block)
        trainer.close()
        machine.read_on_host(t for group in trainer.groups.values() for t in group.tensors())
        trainer.step = 0


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_has_no_race(races, prefetch, disk):
    assert races(deaf(), prefetch, disk) == []


def deaf(*waits):
    return lambda monkeypatch: waits


def replaced(owner, name, call):
    def change(monkeypatch):
        monkeypatch.setattr(owner, name, call)
        return ()

    return change


def never_after_steps(inner=CopyStream.submit):
    return lambda copy_stream, copy, *, after_steps=False: inner(copy_stream, copy)


def without_a_look_at_the_stream(copy_stream):
    while copy_stream._submitted:
        copy_stream._submitted.pop(0).result()


def unblocked(memory, slot, home):
    rest, size = memory._files[home.data_ptr()], rest_file.STAGING_BYTES
    for index, source in enumerate(slot.split(size)):
        staged = memory._staging.next(len(source))
        staged.copy_(source, non_blocking=True)
        rest.write(staged, index * size)


def hasty_swap(offloader):
    offloader.wait()
    offloader._store()
    offloader._load(offloader._current, offloader._slots[offloader.slot])
    return 0.0


def case(name, change, *, prefetch=False, disk=False):
    """What is forgotten, what makes it so, and where it matters."""
    return pytest.param(change, prefetch, disk, id=name)


COPY_STREAM, STAGING = partial(replaced, CopyStream), partial(replaced, memory_module._Staging)
FORGOTTEN = [
    case("steps before a store", deaf("wait_event"), prefetch=True),
    case("that a store follows steps", COPY_STREAM("submit", never_after_steps()), prefetch=True),
    case("a block's arrival", COPY_STREAM("join", lambda *_: None), prefetch=True),
    case("what used a slot before", COPY_STREAM("follow", lambda _: None), prefetch=True),
    case("copies before a look", COPY_STREAM("wait", lambda _: None), prefetch=True),
    case("copies in line before a look", COPY_STREAM("wait", lambda _: None)),
    case("the copies' stream", COPY_STREAM("wait", without_a_look_at_the_stream), prefetch=True),
    case("the steps' stream", deaf("stream.synchronize")),
    case("a staging buffer's event", deaf("event.synchronize"), prefetch=True, disk=True),
    case("a staging buffer's event in line", deaf("event.synchronize"), disk=True),
    case("to mark a staging buffer", STAGING("mark", lambda _: None), prefetch=True, disk=True),
    case("to mark a staging buffer in line", STAGING("mark", lambda _: None), disk=True),
    case("that a store to disk waits", replaced(DiskMemory, "store", unblocked), disk=True),
    case("a timed swap's end", replaced(Offloader, "swap_seconds", hasty_swap), prefetch=True),
    case("to settle at the end", replaced(Offloader, "settle", Offloader._leave), prefetch=True),
]


@pytest.mark.parametrize("change, prefetch, disk", FORGOTTEN)
def test_a_wait_that_is_forgotten_is_a_race(races, change, prefetch, disk):
    assert races(change, prefetch, disk)
