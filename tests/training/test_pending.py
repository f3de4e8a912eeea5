import math

import pytest
import torch
from training.races import Machine

from dbkernels.training.pending import Numbers, Pending, Rows


def finite(loss=1.0, norm=2.0):
    return Numbers([torch.tensor(loss), torch.tensor(norm)])


def refused(loss, norm):
    return FloatingPointError(f"{loss} {norm}")


def pending(step, loss=1.0, norm=2.0):
    row = {"step": step, "loss": math.nan, "grad_norm": math.nan, "lr": 0.1}
    return Pending(row, finite(loss, norm), refused)


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


def test_rows_are_handed_on_in_order_and_one_step_late():
    taken = []
    with Rows(taken.append) as rows:
        for step in range(3):
            rows.add(pending(step))
            assert [row["step"] for row in taken] == list(range(step))
    assert [row["step"] for row in taken] == [0, 1, 2]


def test_settled_rows_are_handed_on_once():
    taken = []
    with Rows(taken.append) as rows:
        rows.add(pending(0))
        rows.settle()
        assert len(taken) == 1
    assert len(taken) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()])
def test_the_last_row_is_handed_on_where_the_next_launch_fails(error):
    taken = []
    with pytest.raises(type(error)), Rows(taken.append) as rows:
        rows.add(pending(0))
        raise error
    assert [row["step"] for row in taken] == [0]


def test_a_step_after_one_that_was_not_finite_is_not_handed_on():
    taken = []
    with pytest.raises(FloatingPointError), Rows(taken.append) as rows:
        rows.add(pending(0))
        rows.add(pending(1, math.nan))
        rows.add(pending(2))
    assert [row["step"] for row in taken] == [0]


class OnGPU:
    """A number on a GPU."""

    is_cuda = True

    def __init__(self, value):
        self.value = value


class Locked:
    """Pages that hold what was copied there when the copy is through."""

    def __init__(self, count):
        self.held, self.coming = [math.nan] * count, None

    def copy_(self, source, *, non_blocking):
        assert non_blocking
        self.coming = source
        return self

    def __iter__(self):
        return iter(self.held)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that runs a copy when it is waited for, and no sooner; and the pages it was given."""
    machine, pages = Machine(), []
    machine.install(monkeypatch)
    arrive = machine.Event.synchronize

    def synchronize(event):
        arrive(event)
        for page in pages:
            page.held = page.coming.values

    def stack(numbers):
        together = torch.zeros(len(numbers))
        together.values = [number.value for number in numbers]
        return together

    def empty(count, *, dtype, pin_memory):
        assert pin_memory and dtype == torch.float32
        pages.append(Locked(count))
        return pages[-1]

    monkeypatch.setattr(machine.Event, "synchronize", synchronize)
    monkeypatch.setattr(torch, "stack", stack)
    monkeypatch.setattr(torch, "empty", empty)
    return pages


def test_a_gpu_is_waited_for_when_its_numbers_are_read_and_no_sooner(gpu):
    numbers = Numbers([OnGPU(1.5), OnGPU(2.5)])
    assert all(math.isnan(value) for page in gpu for value in page.held)
    assert numbers.read() == [1.5, 2.5]


def test_a_gpu_can_be_waited_for_without_a_look(gpu):
    numbers = Numbers([OnGPU(1.5)])
    numbers.wait()
    assert gpu[0].held == [1.5]


def test_numbers_on_a_cpu_are_read_as_they_are():
    loss = torch.tensor(1.5)
    assert Numbers([loss, torch.tensor(2.0)]).read() == [1.5, 2.0]
