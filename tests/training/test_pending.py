"""What a step sends to the device and what comes back: samples, micro-batches, numbers, rows."""

import math
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from training.races import Machine
from training.tiny import equal, make_data

from dbkernels.training.pending import (
    HeldSamples,
    MicroBatch,
    Numbers,
    Pending,
    ReadSamples,
    Rows,
    Staging,
)

INDICES = torch.tensor([3, 1, 4, 1, 5])

# staging


def test_a_tensor_that_is_where_it_is_wanted_is_not_copied():
    tensor = torch.arange(3)
    assert Staging("cpu").put(tensor) is tensor
    assert Staging("meta").put(tensor).device.type == "meta"


def test_a_gpu_is_given_locked_pages_on_a_stream_that_the_steps_wait_for(monkeypatch):
    told, current = [], ["steps"]
    steps = SimpleNamespace(
        name="steps", wait_stream=lambda other: told.append(("wait for", other))
    )

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def to(tensor, device, *, non_blocking=False):
        told.append((device.type, non_blocking, current[-1]))
        return tensor.clone()

    def record_stream(tensor, stream):
        told.append(("used by", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: told.append("lock") or t.clone())
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    staging, tensor = Staging("cuda"), torch.arange(3)
    arrived = staging.put(tensor)
    assert told == ["lock", ("cuda", True, "copies"), ("wait for", "copies"), ("used by", "steps")]
    tensor.zero_()
    assert arrived.tolist() == [0, 1, 2]
    # all of a batch goes this way
    batch = make_data().batch(torch.arange(4), staging.put)
    assert told.count("lock") == 1 + len(batch) == 3


# samples


def test_samples_that_are_read_and_held_give_the_same_pieces_as_often_as_they_are_asked():
    data, held = make_data(), HeldSamples()
    whole = data.batch(INDICES)
    held.fill(whole)
    for samples in (ReadSamples(data, INDICES, torch.clone), held):
        for size, sizes in ((5, [5]), (2, [2, 2, 1]), (9, [5])):
            pieces = list(samples.pieces(size))
            assert [len(piece["label"]) for piece in pieces] == sizes
            assert equal({n: torch.cat([piece[n] for piece in pieces]) for n in whole}, whole)


def test_held_samples_stay_at_their_addresses_and_are_not_those_that_were_given():
    data, held = make_data(), HeldSamples()
    given = data.batch(INDICES)
    held.fill(given)
    (piece,) = held.pieces(5)
    addresses = {name: tensor.data_ptr() for name, tensor in piece.items()}
    given["image"].zero_()
    assert piece["image"].abs().sum() > 0
    other = data.batch(INDICES.flip(0))
    held.fill(other)
    assert equal(piece, other)
    (again,) = held.pieces(5)
    for name, address in addresses.items():
        assert again[name].data_ptr() == address
        assert address not in (given[name].data_ptr(), other[name].data_ptr())


# micro-batches


class Memory:
    """A gradient that needs more memory than there is for more than `fits` samples."""

    def __init__(self, fits):
        self.fits, self.sizes, self.undone, self.kept = fits, [], 0, []

    def gradient(self, size):
        self.sizes.append(size)
        assert not any(kept() is not None for kept in self.kept), "the failed attempt is alive"
        activations = torch.ones(3)
        self.kept.append(weakref.ref(activations))
        if size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(float(size))

    def undo(self):
        self.undone += 1


def attempt(micro_batch, memory):
    return micro_batch.attempt(memory.gradient, memory.undo, "block 1 at its step 3")


def test_a_micro_batch_runs_once_where_memory_is_enough():
    micro_batch, memory = MicroBatch(8, 16), Memory(fits=8)
    assert attempt(micro_batch, memory) == 8
    assert (memory.sizes, memory.undone, micro_batch.size) == ([8], 0, 8)


@pytest.mark.parametrize("size, half", [(8, 4), (5, 3), (2, 1)])
def test_a_micro_batch_is_halved_once_and_stays_at_the_half(size, half):
    micro_batch, memory = MicroBatch(size, 16), Memory(fits=half)
    message = (
        f"out of memory in block 1 at its step 3 with batch 16 in micro-batches of {size}: "
        f"they have {half} from now on"
    )
    with pytest.warns(UserWarning, match=message):
        assert attempt(micro_batch, memory) == half
    assert attempt(micro_batch, memory) == half
    assert (memory.sizes, memory.undone, micro_batch.size) == ([size, half, half], 1, half)


def test_a_second_failure_in_a_step_is_raised_with_its_sizes():
    micro_batch, memory = MicroBatch(8, 16), Memory(fits=2)
    message = "block 1 at its step 3 with batch 16 in micro-batches of 4, halved in this step"
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match=message):
        attempt(micro_batch, memory)
    assert (memory.sizes, memory.undone) == ([8, 4], 2)


@pytest.mark.parametrize("size, least", [(1, 1), (8, 8)])
def test_one_sample_and_the_least_cannot_be_halved(size, least):
    micro_batch, memory = MicroBatch(size, 16, least=least), Memory(fits=size - 1)
    message = f"with batch 16 in micro-batches of {size}, which cannot be halved"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        attempt(micro_batch, memory)
    assert (memory.sizes, memory.undone, micro_batch.size) == ([size], 1, size)


def test_other_errors_pass():
    def broken(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        MicroBatch(8, 16).attempt(broken, lambda: None, "block 0")


# rows


def pending(step, loss=1.0, norm=2.0):
    row = {"step": step, "loss": math.nan, "grad_norm": math.nan, "lr": 0.1}
    numbers = Numbers([torch.tensor(loss), torch.tensor(norm)])
    return Pending(row, numbers, lambda *numbers: FloatingPointError("{} {}".format(*numbers)))


def test_a_row_has_its_numbers_in_their_places():
    assert list(pending(3).row().items()) == [
        ("step", 3), ("loss", 1.0), ("grad_norm", 2.0), ("lr", 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_row_is_refused_where_either_number_is_not_finite(loss, norm):
    with pytest.raises(FloatingPointError, match=f"{loss} {norm}"):
        pending(0, loss, norm).row()


@pytest.fixture
def steps():
    """Steps of the rows that were handed on; a list that takes rows."""

    class Steps(list):
        def take(self, row):
            self.append(row["step"])

    return Steps()


def test_rows_are_handed_on_in_order_one_step_late_and_once(steps):
    with Rows(steps.take) as rows:
        for step in range(3):
            rows.add(pending(step))
            assert steps == list(range(step))
    assert steps == [0, 1, 2]
    with rows:
        rows.add(pending(3))
        rows.settle()
        assert steps == [0, 1, 2, 3]
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_the_last_row_is_handed_on_where_the_next_launch_fails(steps, error):
    with pytest.raises(type(error)), Rows(steps.take) as rows:
        rows.add(pending(0))
        raise error
    assert steps == [0]


def test_a_step_after_one_that_was_not_finite_is_not_handed_on(steps):
    with pytest.raises(FloatingPointError), Rows(steps.take) as rows:
        rows.add(pending(0))
        rows.add(pending(1, math.nan))
        rows.add(pending(2))
    assert steps == [0]


# numbers


class Page(list):
    """Locked pages, which hold what was copied there when the copy is through."""

    def copy_(self, source, *, non_blocking):
        assert non_blocking
        self.coming = source
        return self


@pytest.fixture
def pages(monkeypatch):
    """The pages that were given for numbers of a GPU, which copies when it is waited for."""
    machine, pages = Machine(), []
    machine.install(monkeypatch)
    arrive = machine.Event.synchronize

    def synchronize(event):
        arrive(event)
        for page in pages:
            page[:] = page.coming.values

    def stack(numbers):
        values = [number.value for number in numbers]
        return SimpleNamespace(dtype=torch.float32, device=None, values=values)

    def empty(count, *, dtype, pin_memory):
        assert pin_memory and dtype == torch.float32
        pages.append(Page([math.nan] * count))
        return pages[-1]

    monkeypatch.setattr(machine.Event, "synchronize", synchronize)
    monkeypatch.setattr(torch, "stack", stack)
    monkeypatch.setattr(torch, "empty", empty)
    return pages


def test_a_gpu_is_waited_for_when_its_numbers_are_read_and_no_sooner(pages):
    numbers = [SimpleNamespace(is_cuda=True, value=value) for value in (1.5, 2.5)]
    read, waited = Numbers(numbers), Numbers(numbers[:1])
    assert all(math.isnan(value) for page in pages for value in page)
    assert read.read() == [1.5, 2.5]
    pages[1][:] = []
    waited.wait()
    assert pages[1] == [1.5]


def test_numbers_on_a_cpu_are_read_as_they_are():
    assert Numbers([torch.tensor(1.5), torch.tensor(2.0)]).read() == [1.5, 2.0]
