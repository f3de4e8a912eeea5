"""What a CPU cannot show of training: locked pages, memory in two places, captures, streams.

Races are made likely: one stream sleeps, and the other must wait for it.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from training.recorded import make_captured
from training.tiny import (
    CPU,
    IN_BACKWARD,
    PREFETCH,
    assert_same_steps,
    families,
    make_blocks,
    make_data,
    make_trainer,
    steps,
)

from dbkernels.training.cuda_graphs import CudaRecorder
from dbkernels.training.offload import activations, rest_file
from dbkernels.training.offload.copy_stream import CopyStream
from dbkernels.training.offload.memory import CpuMemory, DiskMemory, pin
from dbkernels.training.pending import Pending, Staging
from dbkernels.training.trainer import Trainer

pytestmark = pytest.mark.gpu

MiB = 2**20
CYCLES = 50_000_000  # some 30 ms, in which a copy of 4 MiB ends a hundred times
NBYTES = 4 * MiB


# a few steps of each family


@families
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_steps_have_the_losses_that_they_have_on_a_cpu(gpu, family, num_blocks):
    here = make_blocks(family, num_blocks, dim=64)
    told = {"steps": 6, "batch_size": 4, "lr": 1e-3}
    there = Trainer(copy.deepcopy(here).to(gpu), make_data(family=family), **told)
    trainers = Trainer(here, make_data(family=family), **told), there
    for index in [*range(num_blocks)] * 2:
        expected, found = (each.step_block(each.blocks[index]) for each in trainers)
        for name in ("loss", "grad_norm"):
            # the noise is the same to the bit, and sums are rounded in another order
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


# blocks off the device


@pytest.mark.needs_gpu("memory in two places")
def test_only_what_is_shared_and_one_block_are_on_the_device(gpu):
    trainer = make_trainer("dit", device=gpu, **CPU)
    for index in (1, 2):
        steps(trainer, [index])
        for name, group in trainer.groups.items():
            there = name in (f"block{index}", "shared")
            assert {tensor.is_cuda for tensor in group.tensors()} == {there}
    trainer.close()
    assert not any(t.is_cuda for t in (*trainer.blocks.parameters(), *trainer.blocks.buffers()))


@pytest.mark.needs_gpu("pages that CUDA locks")
def test_locked_pages_are_those_of_torch_and_a_refusal_disturbs_no_later_kernel(gpu):
    # which unlocks its buffers when it is gone
    memory = CpuMemory(gpu)
    home, other = memory.room(700), memory.room(700)
    assert home.is_pinned() and other.is_pinned()
    assert not pin(home, gpu)
    assert torch.ones(3, device=gpu).sum().item() == 3.0
    address = home.data_ptr()
    del memory
    assert not home.is_pinned() and home.data_ptr() == address


# activations off the device


@pytest.mark.parametrize("settings", [{}, {"autocast": True}, PREFETCH], ids=str)
def test_activations_off_the_device_change_no_bit(gpu, monkeypatch, settings):
    monkeypatch.setattr(activations, "SMALLEST", 16)
    plain, moved = (
        make_trainer("dit", 1, device=gpu, offload_activations=on, **settings)
        for on in (False, True)
    )
    assert_same_steps(moved, plain)
    homes = [home for same in moved.activations.copies._unused.values() for home in same]
    assert homes and {home.is_pinned() for home in homes} == {gpu.type == "cuda"}


# captures


def test_graphs_are_captured_again_after_the_trainer_was_closed(gpu):
    plain = make_trainer("dit", device=gpu, **CPU)
    captured, _ = make_captured("dit", device=gpu, **CPU)
    for _ in range(2):
        assert_same_steps(captured, plain, (0, 0, 0, 1))
        captured.close()


@contextmanager
def no_waiting(device):
    """On a GPU, whoever waits for it raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"accumulate": 2, "autocast": True}, {**PREFETCH, **IN_BACKWARD, "steps_per_swap": 3}],
    ids=str,
)
@pytest.mark.parametrize("family", ["dit", "vit"])
def test_a_launch_waits_for_nothing(gpu, family, settings, cuda_graphs):
    settings = {"device": gpu, "steps": 6, "ema": 0.9, **settings}
    if cuda_graphs:
        trainer, _ = make_captured(family, **settings)
    else:
        trainer = make_trainer(family, **settings)
    # kernels are compiled, pages locked and graphs recorded by then
    steps(trainer, [0, 1, 2] * 4)
    with no_waiting(gpu):
        pending = [trainer.launch(block) for block in trainer.blocks]
    assert [each.row()["block"] for each in pending] == [0, 1, 2]


@pytest.mark.needs_gpu("a wait that CUDA reports")
def test_a_launch_that_waits_would_be_noticed(gpu):
    with no_waiting(gpu), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device=gpu).sum().item()


@pytest.mark.needs_gpu("the memory of graphs")
def test_graphs_share_one_pool(gpu):
    recorder, x = CudaRecorder(gpu), torch.ones(64 * MiB // 4, device=gpu)

    def step():
        return ((x * 2 + x * 3).sum(),)

    recorder.warm_up(step)
    kept, reserved = [], []
    for _ in range(4):
        kept.append(recorder.record(step))
        reserved.append(torch.cuda.memory_reserved())
    for replay, (result,) in kept:
        replay()
        assert result.item() == 5 * x.numel()
    # the temporaries of another pool would be 64 MiB or more, those of a graph's results are small
    assert reserved[-1] - reserved[0] < 32 * MiB


@pytest.mark.needs_gpu("what CUDA forbids beside a capture")
def test_another_thread_may_copy_and_allocate_during_a_capture(gpu):
    recorder, x = CudaRecorder(gpu), torch.ones(3, device=gpu)
    stream, host, copied = torch.cuda.Stream(), torch.ones(MiB), []

    def beside():
        with torch.cuda.stream(stream):
            # a new allocation of the driver's, a copy that waits, and an event that is waited for
            room = torch.zeros(512 * MiB // 4, device=gpu)
            room[: len(host)].copy_(host)
            stream.record_event().synchronize()
            return room[: len(host)].sum().item()

    def step():
        y = x * 2
        with ThreadPoolExecutor(1) as thread:
            copied.append(thread.submit(beside).result())
        return (y + 1,)

    recorder.warm_up(lambda: (x * 2 + 1,))
    replay, (y,) = recorder.record(step)
    replay()
    assert copied == [float(MiB)] and y.tolist() == [3.0] * 3


# streams


@pytest.fixture
def late(gpu):
    """A call after the current stream was busy for a while."""

    def after_a_sleep(call=lambda: None, *arguments):
        if gpu.type == "cuda":
            torch.cuda._sleep(CYCLES)
        return call(*arguments)

    return after_a_sleep


@pytest.fixture
def offload(gpu):
    """Copies beside the steps, memory, room for a block there, and on the device."""
    slot, memory = torch.ones(NBYTES, dtype=torch.uint8, device=gpu), CpuMemory(gpu)
    return CopyStream(gpu, beside=True), memory, memory.room(NBYTES), slot


def test_a_store_waits_for_the_steps_that_write(offload, late):
    copies, memory, home, slot = offload
    for value in (1, 2, 3):
        late(slot.fill_, value)
        copies.submit(partial(memory.store, slot, home), after_steps=True)
        copies.wait()
        assert (home == value).all()


def test_steps_wait_for_the_block_that_arrives(offload, late):
    copies, memory, home, slot = offload
    for value in (4, 5, 6):
        home.fill_(value)
        copies.join(copies.submit(partial(late, memory.load, home, slot)))
        read = slot.clone()
        assert (read == value).all()
        copies.wait()


def test_a_slot_that_is_opened_waits_for_what_its_memory_was(offload, late):
    copies, memory, home, slot = offload
    home.fill_(2)
    read = late(slot.clone)
    copies.follow()
    copies.submit(partial(memory.load, home, slot))
    copies.wait()
    assert (read == 1).all() and (slot == 2).all()


@pytest.mark.parametrize("beside", [False, True])
def test_a_staging_buffer_waits_for_the_copy_before_the_last(
    gpu, offload, tmp_path, late, monkeypatch, beside
):
    monkeypatch.setattr(rest_file, "STAGING_BYTES", NBYTES // 16)
    copies, memory, slot = (
        CopyStream(gpu, beside=beside),
        DiskMemory(tmp_path, NBYTES, gpu),
        offload[-1],
    )
    home, content = memory.room(NBYTES), torch.randint(256, (NBYTES,), dtype=torch.uint8)
    home.copy_(content)
    memory.seal(home, NBYTES)
    copies.join(copies.submit(partial(late, memory.load, home, slot)))
    assert torch.equal(slot.cpu(), content)
    home.zero_()
    copies.submit(partial(memory.store, slot, home), after_steps=True)
    copies.wait()
    assert torch.equal(home, content)


def test_steps_wait_for_samples_that_are_on_their_way(gpu, late):
    staging = Staging(gpu)
    if staging._stream is not None:
        with torch.cuda.stream(staging._stream):
            late()
    read = staging.put(torch.ones(NBYTES)).clone()
    assert (read == 1).all()


def test_samples_stay_until_the_steps_have_read_them(gpu, late):
    staging = Staging(gpu)
    first = staging.put(torch.ones(NBYTES))
    read = late(first.clone)
    # the next ones would lie in the same memory
    del first
    others = [staging.put(torch.zeros(NBYTES)) for _ in range(3)]
    assert (read == 1).all() and not any(other.any() for other in others)


def test_numbers_are_those_of_their_step(gpu, late):
    loss, norm = torch.zeros(2, device=gpu).unbind()
    read = []
    for step in range(1, 4):
        late()
        # in new memory, as a step gives them
        read.append(Pending({}, [loss + step, norm + 2 * step], None))
    assert [each.row() for each in read] == [{"loss": n, "grad_norm": 2 * n} for n in (1, 2, 3)]
