"""A data set is known again by what is in it, and any change of it is seen."""

import shutil

import numpy as np
import pytest
from PIL import Image

import dbkernels.data.digest as digest_module
from dbkernels.data.digest import digest
from dbkernels.data.images import open_data


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.full((4, 4), 10 * index + len(name), dtype=np.uint8)
            pixels[0, 0] = ord(name[0])
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def add(root):
    shutil.copy(root / "cat/0.png", root / "cat/3.png")


def remove(root):
    (root / "cat/0.png").unlink()


def rename(root):
    (root / "cat/0.png").rename(root / "cat/9.png")


def move_to_another_class(root):
    (root / "cat/0.png").rename(root / "dog/9.png")


def swap(root):
    (root / "cat/0.png").rename(root / "x")
    (root / "cat/1.png").rename(root / "cat/0.png")
    (root / "x").rename(root / "cat/1.png")


def longer(root):
    (root / "cat/1.png").write_bytes((root / "cat/1.png").read_bytes() + b"\0")


def bit(root):
    data = bytearray((root / "dog/2.png").read_bytes())
    data[-20] ^= 1
    (root / "dog/2.png").write_bytes(data)


@pytest.mark.parametrize("bound", [1, 2**26], ids=["a few files read", "all files read"])
@pytest.mark.parametrize(
    "change",
    [add, remove, rename, move_to_another_class, swap, longer, bit],
    ids=lambda f: f.__name__,
)
def test_a_change_of_a_folder_is_seen_and_its_place_is_not(folder, monkeypatch, change, bound):
    monkeypatch.setattr(digest_module, "WHOLE_BYTES", bound)
    before = digest(open_data(folder))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert digest(open_data(moved)) == before
    change(moved)
    # of a file that is not read, the name and the size are all that is known
    unseen = bound == 1 and change is bit
    assert (digest(open_data(moved)) == before) == unseen


@pytest.mark.parametrize("bound", [64, 2**26])
@pytest.mark.parametrize("source", ["npy", "npz", "digits"])
def test_arrays_are_read_whole_or_in_part_by_the_same_rule(tmp_path, monkeypatch, source, bound):
    monkeypatch.setattr(digest_module, "WHOLE_BYTES", bound)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 5, 5), dtype=np.uint8)
    labels = np.arange(40) % 3

    def opened(images, labels):
        if source == "npz":
            np.savez(tmp_path / "a.npz", images=images, labels=labels)
            return open_data(tmp_path / "a.npz")
        np.save(tmp_path / "a.npy", images.astype(np.float32))
        np.save(tmp_path / "a_labels.npy", labels)
        return open_data("digits" if source == "digits" else tmp_path / "a.npy")

    before = digest(opened(images, labels))
    assert digest(opened(images, labels)) == before and len(before) == 16
    if source == "digits":
        return
    seen = []
    for row in range(40):
        other = images.copy()
        other[row, 0, 3, 3] ^= 1
        seen.append(digest(opened(other, labels)) != before)
    each = 25 if source == "npz" else 100
    assert sum(seen) == min(40, max(1, bound // each)) and seen[0]
    assert digest(opened(images, np.roll(labels, 1))) != before
    assert digest(opened(images[:-1], labels[:-1])) != before
