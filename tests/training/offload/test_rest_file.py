"""Blocks that rest in files: nothing that the disk has changed is trained on or saved."""

import itertools
import os

import pytest
import torch
from training.tiny import assert_same, copies, families, make_trainer, steps

import dbkernels.training.offload.rest_file as rest_file
from dbkernels.training import checkpoint
from dbkernels.training.offload.memory import DiskMemory
from dbkernels.training.offload.rest_file import RestFile

CPU = torch.device("cpu")


@pytest.fixture(params=[64, 1000, 2**23])
def piece(request, monkeypatch):
    monkeypatch.setattr(rest_file, "STAGING_BYTES", request.param)
    return request.param


@pytest.fixture
def rest(tmp_path):
    file = RestFile(os.open(tmp_path / "rest", os.O_RDWR | os.O_CREAT), tmp_path)
    yield file
    file.close()


def read(rest, first, nbytes):
    return torch.cat(list(rest.read(first, nbytes))) if nbytes else torch.empty(0).byte()


def test_any_bytes_of_a_file_come_back_and_each_piece_is_read_once(rest, piece, monkeypatch):
    random = torch.Generator().manual_seed(0)
    content = torch.randint(256, (3000,), dtype=torch.uint8, generator=random)
    os.pwrite(rest._descriptor, content.numpy().tobytes(), 0)
    rest.seal(1700, 3000)
    # no piece goes across an end, so what is written before it leaves what comes after
    content[:1700] += 1
    for first in range(0, 1700, piece):
        rest.write(content[first : min(first + piece, 1700)], first)
    done, inner = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: done.append(inner(*args)) or done[-1])
    ends = [0, 1, 63, 64, 512, 1699, 1700, 1701, 2999, 3000]
    for first, last in itertools.pairwise(ends):
        assert torch.equal(read(rest, first, last - first), content[first:last])
    assert sum(done) == 3000
    assert torch.equal(read(rest, 10, 2500), content[10:2510])
    # what was read last is not given again when it is another
    assert torch.equal(read(rest, 0, 1), content[:1])
    content[0] += 1
    rest.write(content[: min(piece, 1700)], 0)
    assert torch.equal(read(rest, 0, 1), content[:1])


def test_every_bit_that_flips_and_every_length_is_noticed(rest, monkeypatch):
    monkeypatch.setattr(rest_file, "STAGING_BYTES", 16)
    whole = bytes(range(40))
    os.pwrite(rest._descriptor, whole, 0)
    rest.seal(24, 40)
    for index in range(40):
        for bit in range(8):
            os.pwrite(rest._descriptor, bytes([whole[index] ^ 1 << bit]), index)
            with pytest.raises(ValueError, match="must hold what was written to it, got other"):
                read(rest, 0, 40)
        os.pwrite(rest._descriptor, whole[index : index + 1], index)
    for size in range(40):
        os.pwrite(rest._descriptor, whole, 0)
        os.ftruncate(rest._descriptor, size)
        with pytest.raises(ValueError, match=rf"must have \d+ bytes, got {size}: it was cut short"):
            read(rest, 0, 40)
    os.pwrite(rest._descriptor, whole, 0)
    assert bytes(read(rest, 0, 40).tolist()) == whole


# under a trainer


def disk_trainer(tmp_path, **settings):
    settings = {"offload": "disk", "offload_dir": str(tmp_path / "off"), **settings}
    return make_trainer(ema=0.9, **settings)


def rest_of(trainer, name):
    memory = trainer.offloader._memory
    return memory._files[trainer.offloader._blocks[name].home.data_ptr()]


def save(trainer, root):
    counters = trainer.counters()
    return checkpoint.save(root, trainer.step, trainer.tensors(), counters, read=trainer.read)


@pytest.mark.parametrize("settings", [{}, {"prefetch": True}, {"frozen": "mlp"}])
@families
def test_a_checkpoint_is_read_from_the_files_and_has_the_bits_of_one_from_memory(
    tmp_path, piece, family, settings
):
    rests = disk_trainer(tmp_path, family=family, **settings)
    whole = make_trainer(family, ema=0.9, frozen=settings.get("frozen"))
    for order in ((0, 1), (2, 0)):
        steps(rests, order), steps(whole, order)
        assert_same(rests, whole)
        ours, theirs = save(rests, tmp_path / "a"), save(whole, tmp_path / "b")
        for file in ours.iterdir():
            assert file.read_bytes() == (theirs / file.name).read_bytes()


def test_saving_reads_each_resting_byte_once_and_no_more(tmp_path, monkeypatch):
    trainer, done, inner = disk_trainer(tmp_path), [], os.preadv
    steps(trainer, (0, 1, 2))
    homes = [flat.home for name, flat in trainer.offloader._blocks.items() if name != "block2"]
    trainer.offloader.wait()
    monkeypatch.setattr(os, "preadv", lambda *args: done.append(inner(*args)) or done[-1])
    save(trainer, tmp_path / "a")
    # a block's tensors lie in three files of the checkpoint, and in one piece here
    assert sum(len(home) for home in homes) <= sum(done) <= 3 * sum(len(home) for home in homes)


@pytest.mark.parametrize("cut", [False, True], ids=["a bit flips", "the file is cut short"])
def test_what_the_disk_has_changed_is_neither_saved_nor_trained_on(tmp_path, cut):
    trainer = disk_trainer(tmp_path)
    steps(trainer, (0, 1, 2))
    path, before = save(trainer, tmp_path / "a"), copies(trainer)
    rest = rest_of(trainer, "block1")
    (byte,) = os.pread(rest._descriptor, 1, 100)
    os.ftruncate(rest._descriptor, 0) if cut else os.pwrite(
        rest._descriptor, bytes([byte ^ 16]), 100
    )
    rest._held.clear()
    trainer.step += 1
    message = "cut short" if cut else "must hold what was written to it"
    with pytest.raises(ValueError, match=message):
        save(trainer, tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == [path.name]
    with pytest.raises(ValueError, match=message):
        steps(trainer, [1])
    steps(trainer, [0])
    trainer.close()
    tensors, _ = checkpoint.load(path)
    assert all(
        torch.equal(tensors[group][name], tensor)
        for group, named in before.items()
        for name, tensor in named.items()
    )


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_the_host_writes_to_a_resting_block_is_taken_over(tmp_path, prefetch):
    rests = disk_trainer(tmp_path, prefetch=prefetch)
    whole = make_trainer(ema=0.9)
    for trainer in (rests, whole):
        steps(trainer, (0, 2))
        trainer.offloader.settle()
        with torch.no_grad():
            for parameter in trainer.groups["block1"].parameters.values():
                parameter.mul_(0.5)
        steps(trainer, (1, 2))
    assert_same(rests, whole)


def test_a_disk_that_is_full_when_a_block_goes_home_is_an_error_and_no_signal(
    tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    memory = DiskMemory(tmp_path, 5000, CPU)
    home = memory.room(5000)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        memory.store(torch.zeros(5000, dtype=torch.uint8), home)
