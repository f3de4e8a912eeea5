import gc
import mmap
import os
import shutil
from unittest.mock import MagicMock, Mock, call

import pytest
import torch

import dbkernels.training.offload.rest_file as rest_file
from dbkernels.training.offload.memory import CpuMemory, DiskMemory, flat_bytes, views

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_views_lie_one_after_another_as_aligned_as_allocations_on_a_gpu():
    tensors = [torch.randn(3), torch.randn(200, 2), torch.tensor(5.0), torch.randn(4, 6).t()]
    tensors += [torch.arange(3), torch.randn(3).bfloat16()]
    nbytes = flat_bytes(tensor.nbytes for tensor in tensors)
    assert nbytes == 512 * (1 + 4 + 1 + 1 + 1 + 1)
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    found = views(buffer, tensors)
    for view, tensor in zip(found, tensors, strict=True):
        view.copy_(tensor)
    assert all(map(torch.equal, found, tensors))
    offsets = [view.data_ptr() - buffer.data_ptr() for view in found]
    assert offsets == [0, 512, 512 * 5, 512 * 6, 512 * 7, 512 * 8]
    for view, tensor in zip(found, tensors, strict=True):
        assert (view.dtype, view.stride()) == (tensor.dtype, tensor.stride())


@pytest.mark.parametrize("piece", [64, 2**26])
def test_what_is_stored_is_loaded_again(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(rest_file, "STAGING_BYTES", piece)
    disk = DiskMemory(tmp_path, 3 * 700, CPU)
    # two buffers, whatever is copied, in turn
    buffers = {buffer.data_ptr(): buffer.nbytes for buffer in disk._staging._buffers}
    assert list(buffers.values()) == [min(piece, 3 * 700)] * 2
    assert {disk._staging.next(10).data_ptr() for _ in range(6)} == buffers.keys()
    for memory in (CpuMemory(CPU), disk):
        homes = [memory.room(nbytes) for nbytes in (700, 640, 700)]
        contents = [torch.randint(256, home.shape, dtype=torch.uint8) for home in homes]
        for home, content in zip(homes, contents, strict=True):
            slot = content.clone()
            memory.store(slot, home)
            slot.zero_()
        for home, content in zip(homes, contents, strict=True):
            assert torch.equal(home, content)
            slot = torch.zeros(len(home), dtype=torch.uint8)
            memory.load(home, slot)
            assert torch.equal(slot, content)


def test_a_file_is_on_the_disk_without_a_name_and_gone_with_its_buffer(tmp_path):
    def mapped():
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line or "(deleted)" in line for line in maps)

    before, memory = mapped(), DiskMemory(tmp_path / "new" / "off", 5000, CPU)
    buffer = memory.room(5000)
    assert buffer.shape == (5000,) and buffer.dtype == torch.uint8
    assert mapped() == before + 1
    assert os.listdir(tmp_path / "new" / "off") == []
    del buffer
    gc.collect()
    assert mapped() == before


def test_a_buffer_takes_its_room_on_the_disk_before_it_is_written(tmp_path, monkeypatch):
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: reserved.append(arguments[1:]))
    memory = DiskMemory(tmp_path, 5000, CPU)
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        memory.room(5000)
    assert reserved == [(0, 5000)]


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    message = r"offload_dir must have 1\.50 GiB free for the blocks, got 1\.00 GiB in .*off"
    with pytest.raises(ValueError, match=message):
        DiskMemory(tmp_path / "off", 3 * 2**29, CPU)
    DiskMemory(tmp_path / "off", 2**30, CPU)


@pytest.fixture
def locks(monkeypatch):
    """The CUDA runtime, which grants two locks and refuses a third."""
    runtime = MagicMock()
    runtime.cudaHostRegister.side_effect = [0, 0, 2]
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", MagicMock())
    return runtime


def test_buffers_for_a_gpu_are_locked_as_they_are_and_unlocked_before_they_are_freed(locks):
    memory = CpuMemory(CUDA)
    buffers = [memory.room(700) for _ in range(2)]
    addresses = [buffer.data_ptr() for buffer in buffers]
    assert locks.mock_calls == [call.cudaHostRegister(each, 700, 0) for each in addresses]
    del buffers
    gc.collect()
    assert len(locks.mock_calls) == 2
    del memory
    gc.collect()
    assert locks.mock_calls[2:] == [call.cudaHostUnregister(each) for each in addresses]


def test_refused_page_locking_falls_back_with_one_warning_that_names_the_cost(locks, monkeypatch):
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError))
    memory = CpuMemory(CUDA)
    memory.room(2**12), memory.room(512)
    message = r"32\.0 MiB of host memory cannot be page-locked.*twice as long and none runs"
    with pytest.warns(UserWarning, match=message + " beside") as told:
        buffers = [memory.room(2**25), memory.room(512)]
    assert len(told) == 1 and [buffer.nbytes for buffer in buffers] == [2**25, 512]
    del memory
    gc.collect()
    asked = [name for name, *_ in locks.mock_calls]
    assert asked == ["cudaHostRegister"] * 3 + ["cudaHostUnregister"] * 2


def test_buffers_lie_in_pages_of_their_own_and_are_not_locked_for_a_cpu(locks):
    memory = CpuMemory(CPU)
    buffers = [memory.room(nbytes) for nbytes in (1, 700, 5000)]
    assert all(buffer.data_ptr() % mmap.PAGESIZE == 0 for buffer in buffers)
    assert [buffer.nbytes for buffer in buffers] == [1, 700, 5000] and locks.mock_calls == []
