"""Races on a GPU, made likely: one stream sleeps, and the other must wait for it."""

from functools import partial

import pytest
import torch

import dbkernels.training.offload.memory as memory_module
from dbkernels.training.offload.copy_stream import CopyStream
from dbkernels.training.offload.memory import CpuMemory, DiskMemory
from dbkernels.training.pending import Numbers, Staging

pytestmark = pytest.mark.gpu

CYCLES = 50_000_000  # some 30 ms, in which a copy of 4 MiB ends a hundred times
NBYTES = 2**22


@pytest.fixture
def sleep(gpu):
    """Keep the current stream busy for a while."""
    return lambda: torch.cuda._sleep(CYCLES) if gpu.type == "cuda" else None


@pytest.fixture
def copy_stream(gpu):
    return CopyStream(gpu, beside=True)


@pytest.fixture
def memory(gpu):
    return CpuMemory(gpu)


def bytes_on(device, value):
    return torch.full((NBYTES,), value, dtype=torch.uint8, device=device)


def test_a_store_waits_for_the_steps_that_write(gpu, copy_stream, memory, sleep):
    slot, home = bytes_on(gpu, 0), memory.room(NBYTES)
    for value in (1, 2, 3):
        sleep()
        slot.fill_(value)
        copy_stream.submit(partial(memory.store, slot, home), after_steps=True)
        copy_stream.wait()
        assert (home == value).all()


def test_steps_wait_for_the_block_that_arrives(gpu, copy_stream, memory, sleep):
    slot, home = bytes_on(gpu, 0), memory.room(NBYTES)

    def late():
        sleep()
        memory.load(home, slot)

    for value in (1, 2, 3):
        home.fill_(value)
        copy_stream.join(copy_stream.submit(late))
        read = slot.clone()
        assert (read == value).all()
        copy_stream.wait()


def test_a_slot_that_is_opened_waits_for_what_its_memory_was(gpu, copy_stream, memory, sleep):
    slot, home = bytes_on(gpu, 1), memory.room(NBYTES)
    home.fill_(2)
    sleep()
    read = slot.clone()
    copy_stream.follow()
    copy_stream.submit(partial(memory.load, home, slot))
    copy_stream.wait()
    assert (read == 1).all() and (slot == 2).all()


@pytest.mark.parametrize("beside", [False, True])
def test_a_staging_buffer_waits_for_the_copy_before_the_last(
    gpu, tmp_path, sleep, monkeypatch, beside
):
    monkeypatch.setattr(memory_module, "STAGING_BYTES", NBYTES // 16)
    copy_stream, memory = CopyStream(gpu, beside=beside), DiskMemory(tmp_path, NBYTES, gpu)
    home, slot = memory.room(NBYTES), bytes_on(gpu, 0)
    content = torch.randint(256, (NBYTES,), dtype=torch.uint8)
    home.copy_(content)

    def late():
        sleep()
        memory.load(home, slot)

    copy_stream.join(copy_stream.submit(late))
    assert torch.equal(slot.cpu(), content)
    home.zero_()
    copy_stream.submit(partial(memory.store, slot, home), after_steps=True)
    copy_stream.wait()
    assert torch.equal(home, content)


def test_steps_wait_for_samples_that_are_on_their_way(gpu, sleep):
    staging, sample = Staging(gpu), torch.ones(NBYTES)
    if staging._stream is not None:
        with torch.cuda.stream(staging._stream):
            sleep()
    arrived = staging.put(sample)
    read = arrived.clone()
    assert (read == 1).all()


def test_samples_stay_until_the_steps_have_read_them(gpu, sleep):
    staging = Staging(gpu)
    first = staging.put(torch.ones(NBYTES))
    sleep()
    read = first.clone()
    # the next ones would lie in the same memory
    del first
    others = [staging.put(torch.zeros(NBYTES)) for _ in range(3)]
    assert (read == 1).all() and not any(other.any() for other in others)


def test_numbers_are_those_of_their_step(gpu, sleep):
    loss, norm = torch.zeros(2, device=gpu).unbind()
    read = []
    for step in range(1, 4):
        sleep()
        # in new memory, as a step gives them
        read.append(Numbers([loss + step, norm + 2 * step]))
    assert [numbers.read() for numbers in read] == [[1, 2], [2, 4], [3, 6]]
