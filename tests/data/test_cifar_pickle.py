"""CIFAR's python version, whose files are pickles: what is read of them, and what is refused."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch

from dbkernels.data.cifar_pickle import read_pickled
from dbkernels.data.images import open_data

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 3072), dtype=np.uint8)
LABELS = [9, 0, 3, 3, 1, 7, 2, 5, 4]


def by_python_2(pixels, labels, name):
    """As the published files have it: texts and bytes are alike, in protocol 2."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
    array += text(b"b") + b"\x87R(" + number(1) + number(len(pixels)) + number(3072) + b"\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R(" + number(3)
    array += text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb\x89"
    array += text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    items = text(b"data") + array + text(name.encode()) + listed
    return b"\x80\x02}(" + items + text(b"batch_label") + text(b"one") + b"u."


def by_python_3(pixels, labels, name, protocol=2, key=str.encode):
    return pickle.dumps({key("data"): pixels, key(name): labels, key("x"): [b"a.png"]}, protocol)


WRITERS = {
    "Python 2": by_python_2,
    "Python 3": by_python_3,
    "protocol 4": lambda *of: by_python_3(*of, protocol=4),
    "texts": lambda *of: by_python_3(*of, protocol=4, key=str),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_batches_of_cifar_10_follow_each_other(tmp_path, writer, inside):
    (folder := tmp_path / inside).mkdir(exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    cuts = [0, 1, 3, 4, 5, 7, 9]
    for name, start, stop in zip(names, cuts, cuts[1:], strict=False):
        own = WRITERS[writer](PIXELS[start:stop], LABELS[start:stop], "labels")
        (folder / name).write_bytes(own)
    for split, at in (("train", slice(7)), ("test", slice(7, None))):
        data = open_data(tmp_path, split)
        assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
        assert data.labels.tolist() == LABELS[at] and data.labels.dtype == torch.int64
        assert np.array_equal(data.images, PIXELS[at].reshape(-1, 3, 32, 32))


def test_labels_of_cifar_100_are_the_fine_ones(tmp_path):
    fine = [99, 0, 50, 7, 1, 2, 3, 4, 5]
    found = {b"data": PIXELS, b"coarse_labels": [0] * 9, b"fine_labels": fine}
    (tmp_path / "train").write_bytes(pickle.dumps(found, 2))
    data = open_data(tmp_path)
    assert (data.num_classes, data.labels.tolist()) == (100, fine)
    assert data.batch(torch.tensor([8]))["image"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="has no test split: expected test in it"):
        open_data(tmp_path, "test")


class Calls:
    """A pickle of it calls a function when it is read."""

    def __reduce__(self):
        return os.mkdir, ("called",)


WHOLE = by_python_2(PIXELS, LABELS, "labels")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Calls()), r"it names (posix|nt)\.mkdir, which is not called"),
        (pickle.dumps({b"data": Calls()}), r"it names (posix|nt)\.mkdir, which is not called"),
        (b"cbuiltins\neval\n(Vprint(1)\ntR.", r"it names builtins\.eval, which is not called"),
        (b"cnumpy\nload\n(Vx\ntR.", r"it names numpy\.load, which is not called"),
        (WHOLE[:-30], "(truncated|Ran out)"),
        (b"", "Ran out of input"),
        (b"images", "could not find MARK"),
        (pickle.dumps([1]), "expected a dictionary, got list"),
        (pickle.dumps({b"labels": LABELS}), "no 'data'"),
        (pickle.dumps({b"data": PIXELS}, 2), "no 'labels'"),
        (by_python_3(PIXELS, LABELS[1:], "labels"), "9 images have 8 labels"),
        (by_python_3(PIXELS, [*LABELS[1:], 10], "labels"), r"must be in \[0, 10\), got 10"),
        (by_python_3(PIXELS, [*LABELS[1:], -1], "labels"), r"must be in \[0, 10\), got -1"),
        (by_python_3(PIXELS, [*LABELS[1:], "1"], "labels"), r"must be in \[0, 10\), got 1"),
        (by_python_3(PIXELS[:, 1:], LABELS, "labels"), "cannot reshape"),
        (
            by_python_3(PIXELS.astype("f4"), LABELS, "labels"),
            "expected an array of bytes, got .* f4",
        ),
        (by_python_3(np.asfortranarray(PIXELS), LABELS, "labels"), "expected an array of bytes"),
        (WHOLE.replace(struct.pack("<i", 9) + b"J", struct.pack("<i", 8) + b"J"), "of bytes, got"),
    ],
)
def test_refuses_another_file_and_calls_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(ValueError, match=rf"batch is no whole file of CIFAR's .*: .*{message}"):
        read_pickled(tmp_path / "batch", "labels", 10)
    assert not (tmp_path / "called").exists()


def test_a_file_that_is_missing_is_named(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(WHOLE)
    with pytest.raises(ValueError, match=r"file .*data_batch_2 is missing"):
        open_data(tmp_path)


def test_tokens_are_no_images(tmp_path):
    for name in ("tokens.json", "train.bin"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match="holds tokens of text: expected images"):
        open_data(tmp_path)
