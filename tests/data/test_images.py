import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dbkernels.data.images import ImageData, _permutation, batch_indices, open_data


def dataset(images, labels=None, num_classes=10):
    labels = np.arange(len(images)) % num_classes if labels is None else labels
    return ImageData(images, torch.tensor(labels), num_classes)


def every_step(count, batch_size, steps, **key):
    return [batch_indices(count, batch_size, **key, step=step) for step in range(steps)]


# the order of the samples


# 3 leaves a batch across an epoch's end, 7 none, 10 and 23 put several epochs in one batch
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_every_sample_is_seen_once_per_epoch(batch_size):
    seen = torch.cat(every_step(7, batch_size, 7, seed=1, block=0))
    assert seen.dtype == torch.int64 and len(seen) == 7 * batch_size
    for epoch in seen.split(7):
        assert sorted(epoch.tolist()) == list(range(7))


def test_batch_size_does_not_change_the_order():
    orders = [torch.cat(every_step(7, size, 42 // size, seed=1, block=0)) for size in (1, 3, 14)]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])


def test_any_step_can_be_asked_for_directly():
    expected = {block: every_step(50, 8, 20, seed=3, block=block) for block in range(4)}
    for step in reversed(range(20)):
        for block in (2, 0, 3, 1):
            _permutation.cache_clear()
            actual = batch_indices(50, 8, seed=3, block=block, step=step)
            assert torch.equal(actual, expected[block][step])


@pytest.mark.parametrize("other", [{"seed": 4, "block": 0}, {"seed": 3, "block": 1}], ids=str)
def test_seeds_and_blocks_have_orders_of_their_own(other):
    assert not torch.equal(
        batch_indices(50, 50, seed=3, block=0, step=0), batch_indices(50, 50, **other, step=0)
    )


def test_epochs_have_orders_of_their_own():
    first, second = every_step(50, 50, 2, seed=3, block=0)
    assert not torch.equal(first, second)


def test_writing_into_a_batch_does_not_change_the_next_answer():
    expected = batch_indices(9, 4, seed=0, block=0, step=1).clone()
    batch_indices(9, 4, seed=0, block=0, step=1).zero_()
    assert torch.equal(batch_indices(9, 4, seed=0, block=0, step=1), expected)


def test_a_late_step_needs_no_earlier_one():
    assert len(batch_indices(5, 2, seed=0, block=0, step=10**15)) == 2


@pytest.mark.parametrize("wrong", [{"count": 0}, {"batch_size": 0}, {"step": -1}], ids=str)
def test_rejects_impossible_orders(wrong):
    arguments = {"count": 5, "batch_size": 2, "step": 0} | wrong
    got = ", ".join(str(arguments[name]) for name in ("count", "batch_size"))
    with pytest.raises(ValueError, match=f">= 0, got {got} and {arguments['step']}"):
        batch_indices(**arguments, seed=0, block=0)


# batches


def test_pixels_are_scaled_to_minus_one_and_one():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    image = dataset(pixels).batch(torch.tensor([0]))["image"]
    exact = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 255 * 2 - 1
    torch.testing.assert_close(image.double(), exact, rtol=0, atol=1e-7)
    assert image.dtype == torch.float32 and image.min() == -1 and image.max() == 1


# big-endian files exist, and torch cannot hold them
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f2"])
def test_floats_leave_as_they_are_stored(dtype):
    values = np.array([-300.5, 0.0, 2.25, 7.0], dtype=dtype).reshape(1, 4, 1, 1)
    image = dataset(values).batch(torch.tensor([0]))["image"]
    assert image.dtype == torch.float32
    assert image.flatten().tolist() == [-300.5, 0.0, 2.25, 7.0]


def test_batch_follows_the_order_of_its_indices():
    data = dataset(np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1), [5, 4, 3, 2, 1, 0])
    batch = data.batch(torch.tensor([4, 0, 4]))
    assert batch["image"].flatten().tolist() == [4, 0, 4]
    assert batch["label"].tolist() == [1, 5, 1] and batch["label"].dtype == torch.int64
    assert len(data) == 6 and data.image_shape == (1, 1, 1)


def test_an_empty_batch_keeps_its_shape():
    batch = dataset(np.zeros((3, 1, 2, 5), np.uint8)).batch(torch.empty(0, dtype=torch.int64))
    assert batch["image"].shape == (0, 1, 2, 5) and batch["label"].shape == (0,)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_writing_into_a_batch_does_not_change_the_data(dtype):
    data = dataset(np.ones((2, 1, 2, 2), dtype))
    batch = data.batch(torch.tensor([0, 1]))
    expected = batch["image"].clone()
    batch["image"].zero_()
    batch["label"].fill_(7)
    again = data.batch(torch.tensor([0, 1]))
    assert torch.equal(again["image"], expected) and again["label"].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_batch_is_put_where_it_is_wanted(dtype):
    put = partial(Tensor.to, device="meta")
    batch = dataset(np.ones((2, 1, 2, 2), dtype)).batch(torch.tensor([1]), put)
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_only_finite_images_are_handed_out(value):
    images = np.zeros((5, 1, 2, 2))
    images[3, 0, 1, 1] = value
    data = dataset(images)
    data.batch(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="finite in float32, sample 3 is not"):
        data.batch(torch.tensor([0, 3, 4]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0]]), r"must be \(B,\) int64, got \(1, 1\) torch.int64"),
        (torch.tensor([0], dtype=torch.int32), "got .* torch.int32"),
        (torch.tensor([0.0]), "got .* torch.float32"),
        (torch.tensor([0, -1]), r"must be in \[0, 3\), got -1"),
        (torch.tensor([2, 3]), r"must be in \[0, 3\), got 3"),
    ],
)
def test_rejects_wrong_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        dataset(np.zeros((3, 1, 2, 2), np.uint8)).batch(indices)


# sources


def test_digits_are_held_out_by_class_and_never_shared():
    train, test = open_data("digits"), open_data("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 8, 8) and train.num_classes == test.num_classes == 10
    difference = train.labels.bincount() / len(train) - test.labels.bincount() / len(test)
    assert difference.abs().max() < 0.003

    images = [data.batch(torch.arange(len(data)))["image"] for data in (train, test)]
    rows = {tuple(image.flatten().tolist()) for image in torch.cat(images)}
    assert len(rows) == 1797
    assert all(image.min() == -1 and image.max() == 1 for image in images)


def test_digits_are_split_the_same_way_every_time():
    first, second = (open_data("digits", "test").images for _ in range(2))
    assert np.array_equal(first, second)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install dbkernels\[demo\]"):
        open_data("digits")


def test_a_path_object_is_a_source(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 1, 8, 8), np.uint8), labels=[0, 1])
    assert len(open_data(tmp_path / "a.npz")) == len(open_data(str(tmp_path / "a.npz"))) == 2


def test_num_classes_may_be_larger_than_the_labels_show(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 1, 8, 8), np.uint8), labels=[0, 3])
    path = str(tmp_path / "a.npz")
    assert open_data(path).num_classes == 4
    assert open_data(path, num_classes=4).num_classes == 4
    assert open_data(path, num_classes=1000).num_classes == 1000
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3"):
        open_data(path, num_classes=3)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.uint8), [0, -1], "labels must not be negative, got -1"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0.0, 1.0], r"labels must be \(N,\) int.* float64"),
        (np.zeros((2, 1, 8, 8), np.uint8), [True, False], "labels must be .* bool"),
        (np.zeros((2, 1, 8, 8), np.uint8), [[0, 1]], r"labels must be .* \(1, 2\)"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0], "one label per train image: 2 images, 1 labels"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0, 1, 2], "2 images, 3 labels"),
        (np.zeros((2, 1, 8, 8), np.int64), [0, 1], "uint8 or floating point, got int64"),
        (np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, int), "train images of .* are empty"),
        (np.zeros((2, 1, 0, 8), np.uint8), [0, 1], r"are empty: shape \(2, 1, 0, 8\)"),
    ],
)
def test_rejects_unusable_arrays(tmp_path, images, labels, message):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path / "a.npz"))


def test_rejects_what_is_not_a_source(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"data source .*missing.npz does not exist"):
        open_data(str(tmp_path / "missing.npz"))
    with pytest.raises(ValueError, match=r"unknown format a.csv: expected a folder"):
        open_data(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        open_data("digits", "val")
