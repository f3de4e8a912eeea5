"""What stands in the way of a checkpoint, and who comes to it meanwhile."""

import errno
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from training.checkpoints import assert_holds, bits, names, numbered, saved

from dbkernels import whole_file
from dbkernels.training import checkpoint
from dbkernels.training.checkpoint import latest, load, load_latest, save

# what stands in the way of a save


def stray_file(root):
    (root / "step-00000002").write_text("mine")


def stray_replaced(root):
    (root / "step-00000002.replaced").write_text("mine")


def stray_link(root):
    (root / "step-00000003").symlink_to(root / "nothing")


def stray_temporary(root):
    (root / f".step-00000002-{os.getpid()}").write_text("mine")


def temporary_link(root):
    (root / "other").mkdir()
    (root / f".step-00000002-{os.getpid()}").symlink_to(root / "other")


STRAYS = [stray_file, stray_replaced, stray_link, stray_temporary, temporary_link]


@pytest.mark.parametrize("stray", STRAYS, ids=lambda stray: stray.__name__)
def test_what_has_a_checkpoints_name_and_is_none_is_said_and_left_alone(tmp_path, stray):
    saved(tmp_path, 1)
    stray(tmp_path)
    before = names(tmp_path)
    for call in (lambda: saved(tmp_path, 2), lambda: checkpoint.check_root(tmp_path, 0)):
        with pytest.raises(ValueError, match="must be the directory of a checkpoint, got a "):
            call()
    assert names(tmp_path) == before
    assert_holds(latest(tmp_path), 1)


def test_a_root_is_made_and_left_empty_where_checkpoints_can_be_saved(tmp_path):
    checkpoint.check_root(tmp_path / "new" / "root", 1000)
    assert names(tmp_path / "new" / "root") == []


def test_a_root_is_looked_at_while_another_process_is_in_the_middle_of_a_save(tmp_path):
    (path,) = saved(tmp_path, 1)
    path.rename(path.with_suffix(".replaced"))
    for name in (f".step-00000001-{os.getppid()}", f".probe-{os.getpid()}"):
        (tmp_path / name).mkdir()
    checkpoint.check_root(tmp_path, 0)
    assert names(tmp_path) == [f".step-00000001-{os.getppid()}", "step-00000001.replaced"]


def test_a_root_that_cannot_be_written_or_has_no_room_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        checkpoint.check_root(tmp_path / "file", 0)
    with pytest.raises(ValueError, match=r"root must have .* free for a checkpoint, got"):
        checkpoint.check_root(tmp_path / "root", 2**73)
    refused = OSError(errno.EROFS, "Read-only file system")

    def read_only(path):
        raise refused

    monkeypatch.setattr(whole_file, "new_file", read_only)
    with pytest.raises(OSError, match=r"^cannot write into .*root: Read-only file system$"):
        checkpoint.check_root(tmp_path / "root", 0)
    assert names(tmp_path / "root") == []


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for call in (latest, load_latest):
        with pytest.raises(PermissionError):
            call(tmp_path)
    with pytest.raises(NotADirectoryError):
        monkeypatch.undo()
        latest(saved(tmp_path, 1)[0] / "state.json")


# a damaged one gives way


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
def test_the_newest_that_is_whole_is_read_and_the_damaged_are_named(tmp_path, name):
    paths = saved(tmp_path, 1, 2, 3, 4)
    for path in paths[2:]:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 4
        (path / name).write_bytes(data)
    with pytest.warns(UserWarning) as told:
        path, tensors, state = load_latest(tmp_path)
    assert (path, bits(tensors), state) == (paths[1], bits(numbered(2)[0]), {"step": 2})
    found = [str(warning.message) for warning in told]
    assert len(found) == 2 and all(
        str(path) in text and name in text and text.endswith("; it is passed over")
        for path, text in zip(reversed(paths[2:]), found, strict=True)
    )


def test_where_none_is_whole_the_reason_is_told(tmp_path):
    with pytest.raises(ValueError, match="must hold a checkpoint, got none"):
        load_latest(tmp_path / "none")
    (path,) = saved(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="expected bytes"):
        load_latest(tmp_path)


# several at once


def test_a_reader_beside_a_writer_that_keeps_one_always_finds_a_whole_one(tmp_path, recwarn):
    saved(tmp_path, 1, keep=1)
    ended, found = threading.Event(), []

    def read():
        while not ended.is_set():
            found.append(load_latest(tmp_path)[2]["step"])

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        # the same step again and again too: then one of its name takes its place
        for step in [*range(2, 40), *[40] * 40]:
            saved(tmp_path, step, keep=1)
        ended.set()
        for reader in readers:
            reader.result()
    assert len(found) > 10 and set(found) <= set(range(1, 41))
    assert not [w for w in recwarn if "passed over" in str(w.message)]


def test_threads_save_one_after_another(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(saved, tmp_path, step % 7, keep=3) for step in range(60)]:
            each.result()
    assert len(names(tmp_path)) == 3
    for path in tmp_path.iterdir():
        load(path)


# numbers


def test_weights_that_are_not_finite_are_not_published(tmp_path):
    tensors = {"model": {"a": torch.ones(3), "b": torch.tensor([1.0, math.nan])}}
    saved(tmp_path, 1)
    with pytest.raises(FloatingPointError, match=r"weights must be finite to be saved, got .* b$"):
        save(tmp_path, 2, tensors, {}, finite=("model",))
    assert names(tmp_path) == ["step-00000001"]
    save(tmp_path, 2, {"optimizer": tensors["model"]}, {}, finite=("model", "ema"))
