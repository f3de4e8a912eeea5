from contextlib import contextmanager

import pytest
import torch
from training.tiny import make_data

from dbkernels.training.pending import Staging


def test_a_tensor_that_is_where_it_is_wanted_is_not_copied():
    tensor = torch.arange(3)
    assert Staging("cpu").put(tensor) is tensor
    assert Staging("meta").put(tensor).device.type == "meta"


class Stream:
    """A stream that says what it waits for."""

    def __init__(self, name, told):
        self.name, self._told = name, told

    def wait_stream(self, other):
        self._told.append((self.name, "wait for", other.name))


@pytest.fixture
def told(monkeypatch):
    """What a GPU is told of a tensor that is put on it, in order."""
    told, current = [], []
    steps = Stream("steps", told)

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def to(tensor, device, *, non_blocking=False):
        told.append((device.type, non_blocking, current[-1].name))
        return tensor.clone()

    def record_stream(tensor, stream):
        told.append(("used by", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: told.append("lock") or t.clone())
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return told


def test_a_gpu_is_given_locked_pages_on_a_stream_that_the_steps_wait_for(told):
    tensor = torch.arange(3)
    arrived = Staging("cuda").put(tensor)
    assert told == [
        "lock",
        ("cuda", True, "copies"),
        ("steps", "wait for", "copies"),
        ("used by", "steps"),
    ]
    tensor.zero_()
    assert arrived.tolist() == [0, 1, 2]


def test_all_of_a_batch_goes_through_it(told):
    batch = make_data().batch(torch.arange(4), Staging("cuda").put)
    assert told.count("lock") == len(batch) == 2
