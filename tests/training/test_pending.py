"""What a step sends to the device and what comes back: samples, numbers, rows."""

import math
from functools import partial
from unittest.mock import MagicMock, call

import pytest
import torch
from training.tiny import equal, make_data

from dbkernels.training.pending import HeldSamples, Pending, Rows, Staging, read_pieces

INDICES = torch.tensor([3, 1, 4, 1, 5])

# samples


def test_a_tensor_that_is_where_it_is_wanted_is_not_copied():
    tensor = torch.arange(3)
    assert Staging("cpu").put(tensor) is tensor
    assert Staging("meta").put(tensor).device.type == "meta"


def test_a_gpu_is_given_locked_pages_on_a_stream_that_the_steps_wait_for(monkeypatch):
    told, device = MagicMock(), torch.device("cuda")
    monkeypatch.setattr(torch, "cuda", told)
    arrived = Staging("cuda").put(told.tensor)
    copies, steps = told.Stream.return_value, told.current_stream.return_value
    assert arrived is told.tensor.pin_memory.return_value.to.return_value
    assert told.mock_calls == [
        call.Stream(device),
        call.tensor.pin_memory(),
        call.current_stream(device),
        call.stream(copies),
        call.stream().__enter__(),
        call.tensor.pin_memory().to(device, non_blocking=True),
        call.stream().__exit__(None, None, None),
        call.current_stream().wait_stream(copies),
        call.tensor.pin_memory().to().record_stream(steps),
    ]


def test_samples_that_are_read_and_held_give_the_same_pieces_as_often_as_they_are_asked():
    data, held = make_data(), HeldSamples()
    whole = data.batch(INDICES)
    held.fill(whole)
    for pieces_of in (partial(read_pieces, data, INDICES, torch.clone), held.pieces):
        for size, sizes in ((5, [5]), (2, [2, 2, 1]), (9, [5])):
            pieces = list(pieces_of(size))
            assert [len(piece["label"]) for piece in pieces] == sizes
            assert equal({n: torch.cat([piece[n] for piece in pieces]) for n in whole}, whole)


def test_held_samples_stay_at_their_addresses_and_are_not_those_that_were_given():
    data, held = make_data(), HeldSamples()
    given, other = data.batch(INDICES), data.batch(INDICES.flip(0))
    held.fill(given)
    (piece,) = held.pieces(5)
    given["image"].zero_()
    assert piece["image"].abs().sum() > 0
    held.fill(other)
    (again,) = held.pieces(5)
    assert equal(piece, other)
    for name, tensor in piece.items():
        assert again[name].data_ptr() == tensor.data_ptr()
        assert tensor.data_ptr() not in (given[name].data_ptr(), other[name].data_ptr())


# rows


def pending(step):
    row = {"step": step, "loss": math.nan, "grad_norm": math.nan, "lr": 0.1}
    return Pending(row, [torch.tensor(1.0), torch.tensor(2.0)], None)


def test_rows_are_handed_on_in_order_one_step_late_and_once():
    rows, told = Rows(lambda row: told.append(row["step"])), []
    with rows:
        for step in range(3):
            rows.add(pending(step))
            assert told == list(range(step))
    assert told == [0, 1, 2]
    with rows:
        rows.add(pending(3))
        rows.settle()
        assert told == [0, 1, 2, 3]
    assert told == [0, 1, 2, 3]
    # with its numbers in their places
    whole = [("step", 3), ("loss", 1.0), ("grad_norm", 2.0), ("lr", 0.1)]
    assert list(pending(3).row().items()) == whole


@pytest.mark.parametrize("settle", [False, True])
def test_rows_tell_that_a_process_was_asked_to_end_however_they_are_read(settle):
    rows = Rows(lambda row: None)
    for step, asked in ((0, 0.0), (1, 2.0), (2, 0.0)):
        told = [torch.tensor(number) for number in (1.0, 2.0, asked)]
        rows.add(Pending({"step": step}, told, None))
        assert rows.is_asked == (step == 2)
        if settle:
            rows.settle()
            assert rows.is_asked == (step >= 1)


def test_where_a_row_cannot_be_taken_the_one_of_the_step_behind_it_still_is():
    told = []

    def take(row):
        told.append(row["step"])
        if row["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Rows(take) as rows:
        for step in range(5):
            rows.add(pending(step))
    assert told == [0, 1, 2]


def test_a_gpu_is_waited_for_when_its_numbers_are_read_and_no_sooner(monkeypatch):
    told = MagicMock()
    told.loss.is_cuda = True
    for name in ("stack", "empty", "cuda"):
        monkeypatch.setattr(torch, name, getattr(told, name))
    launched = Pending({}, [told.loss, told.norm], None)
    together = told.stack.return_value
    assert told.mock_calls == [
        call.stack([told.loss, told.norm]),
        call.empty(2, dtype=together.dtype, pin_memory=True),
        call.empty().copy_(together, non_blocking=True),
        call.cuda.current_stream(together.device),
        call.cuda.current_stream().record_event(),
    ]
    told.reset_mock()
    told.empty.return_value.copy_.return_value.__iter__.return_value = [1.5, 2.5]
    launched.wait()
    assert launched.row() == {"loss": 1.5, "grad_norm": 2.5}
    wait = "cuda.current_stream().record_event().synchronize"
    assert [name for name, *_ in told.mock_calls] == [wait, wait, "empty().copy_().__iter__"]
