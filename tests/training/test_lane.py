import threading
from types import SimpleNamespace

import pytest
import torch

from dbkernels.training.lane import Lane

CPU = torch.device("cpu")


@pytest.mark.parametrize("beside", [False, True])
def test_copies_run_in_the_order_in_which_they_came(beside):
    lane, ran = Lane(CPU, beside=beside), []
    for index in range(9):
        lane.submit(lambda index=index: ran.append(index), after_steps=bool(index % 2))
    lane.wait()
    assert ran == list(range(9))


def test_copies_between_the_steps_are_through_at_once():
    lane, ran = Lane(CPU, beside=False), []
    lane.join(lane.submit(lambda: ran.append(threading.current_thread())))
    assert ran == [threading.main_thread()]


def test_copies_beside_the_steps_hold_up_only_who_joins_or_waits():
    lane, gates, ran = Lane(CPU, beside=True), [threading.Event(), threading.Event()], []

    def gated(index):
        assert gates[index].wait(timeout=10)
        ran.append((index, threading.current_thread() is threading.main_thread()))

    first = lane.submit(lambda: gated(0))
    lane.submit(lambda: gated(1))
    assert ran == []
    gates[0].set()
    lane.join(first)
    assert ran == [(0, False)]
    gates[1].set()
    lane.wait()
    assert ran == [(0, False), (1, False)]


@pytest.mark.parametrize("door", ["join", "wait", "submit"])
def test_a_copy_that_failed_beside_the_steps_raises_later(door):
    lane = Lane(CPU, beside=True)

    def broken():
        raise OSError("no such disk")

    failed = lane.submit(broken)
    failed.exception(timeout=10)
    calls = {
        "join": lambda: lane.join(failed),
        "wait": lane.wait,
        "submit": lambda: lane.submit(list),
    }
    with pytest.raises(OSError, match="no such disk"):
        calls[door]()


def test_copies_follow_the_steps_on_a_stream_of_their_own(monkeypatch):
    waits = []
    copies = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "steps")
    Lane(torch.device("cuda"), beside=True).follow()
    Lane(torch.device("cuda"), beside=False).follow()
    assert waits == ["steps"]
