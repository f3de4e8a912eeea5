from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dbkernels.data.images import ImageData, batch_indices, forget_orders


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


def test_any_step_can_be_asked_for_directly_and_its_batch_written_into():
    expected = {block: every_step(50, 8, 20, seed=3, block=block) for block in range(4)}
    for step in reversed(range(20)):
        for block in (2, 0, 3, 1):
            forget_orders()
            for _ in range(2):
                actual = batch_indices(50, 8, seed=3, block=block, step=step)
                assert torch.equal(actual, expected[block][step])
                actual.zero_()


@pytest.mark.parametrize("other", [{"seed": 4}, {"block": 1}, {"step": 1}], ids=str)
def test_seeds_blocks_and_epochs_have_orders_of_their_own(other):
    asked = {"seed": 3, "block": 0, "step": 0}
    assert not torch.equal(batch_indices(50, 50, **asked), batch_indices(50, 50, **asked | other))


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
