from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dbkernels.data import images as module
from dbkernels.data.images import ImageData, batch_indices, forget_orders
from dbkernels.data.order import samples_at


def dataset(images, labels=None):
    labels = np.arange(len(images)) % 10 if labels is None else labels
    return ImageData(images, torch.tensor(labels), 10)


def every_step(count, batch_size, steps, **key):
    return [batch_indices(count, batch_size, **key, step=step) for step in range(steps)]


# the order of the samples


@pytest.fixture(params=["listed", "computed"])
def order(request, monkeypatch):
    """Either way to an order, whatever the number of samples."""
    monkeypatch.setattr(module, "MOST_LISTED", 2**24 if request.param == "listed" else 0)


# 3 leaves a batch across an epoch's end, 7 none, 10 and 23 put several epochs in one batch
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_every_sample_is_seen_once_per_epoch_in_an_order_that_batches_do_not_change(
    order, batch_size
):
    seen = torch.cat(every_step(7, batch_size, 7, seed=1, block=0))
    assert seen.dtype == torch.int64 and len(seen) == 7 * batch_size
    assert torch.equal(seen, torch.cat(every_step(7, 1, 7 * batch_size, seed=1, block=0)))
    for epoch in seen.split(7):
        assert sorted(epoch.tolist()) == list(range(7))


def test_any_step_can_be_asked_for_directly_and_its_batch_written_into(order):
    expected = {block: every_step(50, 8, 20, seed=3, block=block) for block in range(4)}
    for step in reversed(range(20)):
        for block in (2, 0, 3, 1):
            forget_orders()
            for _ in range(2):
                actual = batch_indices(50, 8, seed=3, block=block, step=step)
                assert torch.equal(actual, expected[block][step])
                actual.zero_()
    assert len(batch_indices(5, 2, seed=0, block=0, step=10**15)) == 2


@pytest.mark.parametrize("other", [{"seed": 4}, {"block": 1}, {"step": 1}], ids=str)
def test_seeds_blocks_and_epochs_have_orders_of_their_own(order, other):
    asked = {"seed": 3, "block": 0, "step": 0}
    assert not torch.equal(batch_indices(50, 50, **asked), batch_indices(50, 50, **asked | other))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 16, 17, 1000])
def test_an_order_that_is_computed_has_every_sample_once(count):
    orders = [samples_at(torch.arange(count), count, seed).tolist() for seed in range(20)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 4 or len({tuple(order) for order in orders}) > 10


@pytest.mark.parametrize("count", [3 * 2**23, 3 * 2**40])  # of an odd and an even number of bits
def test_an_order_of_any_number_of_samples_is_mixed_as_a_listed_one(count):
    """Samples lie evenly in the data, and neither the next place nor the next seed tells of one."""
    places = torch.arange(4000) + count // 3
    samples = samples_at(places, count, 5)
    following, other = samples_at(places + 1, count, 5), samples_at(places, count, 6)
    for some in (samples, (following - samples) % count, (other - samples) % count):
        shares = torch.bincount(some * 20 // count, minlength=20) / 4000
        # five standard deviations of a share
        assert shares.tolist() == pytest.approx([0.05] * 20, abs=5 * (0.05 * 0.95 / 4000) ** 0.5)
    batch = batch_indices(count, 64, seed=1, block=0, step=10**9)
    assert len(set(batch.tolist())) == 64 and batch.min() >= 0 and batch.max() < count


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
    assert image.dtype == torch.float32 and image.flatten().tolist() == [-300.5, 0.0, 2.25, 7.0]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_batch_may_be_empty_or_written_into_and_is_put_where_it_is_wanted(dtype):
    data, both = dataset(np.ones((2, 1, 2, 5), dtype)), torch.tensor([0, 1])
    batch = data.batch(both)
    expected = batch["image"].clone()
    batch["image"].zero_()
    batch["label"].fill_(7)
    again, none = data.batch(both), data.batch(both[:0])
    assert torch.equal(again["image"], expected) and again["label"].tolist() == [0, 1]
    assert none["image"].shape == (0, 1, 2, 5) and none["label"].shape == (0,)
    elsewhere = data.batch(both, partial(Tensor.to, device="meta"))
    assert {tensor.device.type for tensor in elsewhere.values()} == {"meta"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_only_finite_images_are_handed_out(value):
    images = np.zeros((5, 1, 2, 2))
    images[3, 0, 1, 1] = value
    data = dataset(images)
    data.batch(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="finite in float32, sample 3 is not"):
        data.batch(torch.tensor([0, 3, 4]))


def of_three(indices, dtype=torch.int64):
    return dataset(np.zeros((3, 1, 2, 2), np.uint8)).batch(torch.tensor(indices, dtype=dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_indices(0, 2, seed=0, block=0, step=0), ">= 0, got 0, 2 and 0"),
        (lambda: batch_indices(5, 0, seed=0, block=0, step=0), ">= 0, got 5, 0 and 0"),
        (lambda: batch_indices(5, 2, seed=0, block=0, step=-1), ">= 0, got 5, 2 and -1"),
        (lambda: of_three([[0]]), r"must be \(B,\) int64, got \(1, 1\) torch.int64"),
        (lambda: of_three([0], torch.int32), "got .* torch.int32"),
        (lambda: of_three([0], torch.float32), "got .* torch.float32"),
        (lambda: of_three([0, -1]), r"must be in \[0, 3\), got -1"),
        (lambda: of_three([2, 3]), r"must be in \[0, 3\), got 3"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
