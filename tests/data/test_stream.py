import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training.tiny import equal, make_data

from dbkernels.data.made_up import Field, MadeUpData
from dbkernels.data.stream import Stream, is_stream

IMAGES, LABELS = torch.arange(24.0).view(12, 2), torch.arange(12)


def loader(size=4, **settings):
    return DataLoader(TensorDataset(IMAGES, LABELS), size, **settings)


def dicts(*changes):
    """Batches of four; each changed as it says."""
    for first, change in zip(range(0, 12, 4), changes, strict=True):
        batch = {"image": IMAGES[first : first + 4], "label": LABELS[first : first + 4]}
        yield {**batch, **change}


class Counting(IterableDataset):
    """Tells where it is, and goes on from there."""

    def __init__(self):
        self.at, self.skipped = 0, 0

    def __iter__(self):
        while self.at < 9:
            self.at += 1
            yield {"n": torch.full((4,), self.at)}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        (loader(), True),
        (dicts({}, {}, {}), True),
        (Counting(), True),
        ([{"a": 1}], False),
        (make_data(), False),
        (MadeUpData({"a": Field((), torch.float32)}, 4), False),
        (TensorDataset(LABELS), False),
        (7, False),
    ],
)
def test_a_stream_has_batches_in_an_order_and_none_by_index(source, is_one):
    assert is_stream(source) is is_one


def test_batches_come_in_order_as_tensors_under_their_names():
    stream = Stream(loader(), 4, ("image", "label"))
    for first in (0, 4, 8):
        expected = {"image": IMAGES[first : first + 4], "label": LABELS[first : first + 4]}
        assert equal(stream.next(), expected)
    arrays = Stream(iter([{"a": np.ones((2, 3), np.int32)}]), 2)
    assert arrays.next()["a"].dtype == torch.int32


def test_the_end_says_how_many_there_were_and_what_to_do():
    stream = Stream(loader(6), 6, ("image", "label"))
    for _ in range(2):
        stream.next()
    message = "DataLoader must have a batch for every step, got its end after 2: give a generator"
    with pytest.raises(ValueError, match=message):
        stream.next()


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        (loader(5), ("a", "b"), "a of batch 0 must have batch_size = 4 samples, got 5; drop_last"),
        (iter([{"a": torch.tensor(1)}]), None, "a of batch 0 must have .* samples, got a number"),
        (iter([{"a": [1, 2, 3, 4]}]), None, "a of batch 0 must be a tensor, an array .*, got list"),
        (loader(), None, "batch 0 must be a dict, got list; keys names its parts"),
        (
            dicts({}, {"image": torch.zeros(4, 3)}, {}),
            None,
            r"samples of batch 1 must have {'image': '\(2,\) .* as before, got {'image': '\(3,\) ",
        ),
        (dicts({}, {"label": torch.zeros(4)}, {}), None, "batch 1 .*int64'} as before.*float32'}$"),
        (dicts({}, {"more": LABELS[:4]}, {}), None, "samples of batch 1 must have .*'more'"),
    ],
)
def test_rejects_batches_that_are_no_whole_step(source, keys, message):
    stream = Stream(source, 4, keys)
    with pytest.raises(ValueError, match=message):
        for _ in range(3):
            stream.next()


@pytest.mark.parametrize("make", [loader, lambda: dicts({}, {}, {}), Counting])
@pytest.mark.parametrize("before", [0, 1])
def test_a_new_stream_goes_on_behind_the_batches_that_were_read(make, before):
    keys = ("n",) if make is Counting else ("image", "label")
    first, second = (Stream(make(), 4, keys) for _ in range(2))
    for _ in range(2):
        first.next()
    for _ in range(before):
        second.next()
    second.check(place := first.place())
    second.go_on(place)
    assert second.count == 2 and equal(first.next(), second.next())


def test_a_stream_that_can_begin_again_goes_back():
    stream = Stream(loader(), 4, ("image", "label"))
    place, first = stream.place(), stream.next()
    stream.go_on(place)
    assert equal(stream.next(), first)


@pytest.mark.parametrize(
    ("source", "place", "message"),
    [
        (dicts({}, {}, {}), {"batches": 0}, "generator must be new to go on behind 0 .* 1 were re"),
        (loader(), {}, "the place of the stream DataLoader must have batches, got {}"),
        (loader(), {"batches": 1, "state": 3}, "must have batches, got"),
        (Counting(), {"batches": 1}, "the stream Counting must have batches, state, got"),
        (loader(), {"batches": -1}, "must be a whole number from 0, got -1"),
        (loader(), {"batches": 1.0}, "must be a whole number from 0, got 1.0"),
        (loader(), 3, "must have batches, got 3"),
        (loader(), {"batches": 4}, "got its end after 3"),
    ],
)
def test_rejects_a_place_that_is_not_of_such_a_stream(source, place, message):
    stream = Stream(source, 4, ("n",) if isinstance(source, Counting) else ("image", "label"))
    stream.next()
    with pytest.raises(ValueError, match=message):
        stream.check(place)
        stream.go_on(place)
