import threading

import pytest
import torch

from dbkernels.training.offload.copy_stream import CopyStream

CPU = torch.device("cpu")


@pytest.mark.parametrize("beside", [False, True])
def test_copies_run_in_the_order_in_which_they_came(beside):
    copy_stream, ran = CopyStream(CPU, beside=beside), []
    for index in range(9):
        copy_stream.submit(lambda index=index: ran.append(index), after_steps=bool(index % 2))
    copy_stream.wait()
    assert ran == list(range(9))


def test_copies_between_the_steps_are_through_at_once():
    copy_stream, ran = CopyStream(CPU, beside=False), []
    copy_stream.join(copy_stream.submit(lambda: ran.append(threading.current_thread())))
    assert ran == [threading.main_thread()]


def test_copies_beside_the_steps_hold_up_only_who_joins_or_waits():
    gates, ran = [threading.Event(), threading.Event()], []
    copy_stream = CopyStream(CPU, beside=True)

    def gated(index):
        assert gates[index].wait(timeout=10)
        ran.append((index, threading.current_thread() is threading.main_thread()))

    first = copy_stream.submit(lambda: gated(0))
    copy_stream.submit(lambda: gated(1))
    assert ran == []
    gates[0].set()
    copy_stream.join(first)
    assert ran == [(0, False)]
    gates[1].set()
    copy_stream.wait()
    assert ran == [(0, False), (1, False)]


@pytest.mark.parametrize(
    "later",
    [
        lambda copy_stream, failed: copy_stream.join(failed),
        lambda copy_stream, failed: copy_stream.wait(),
        lambda copy_stream, failed: copy_stream.submit(list),
    ],
    ids=["join", "wait", "submit"],
)
def test_a_copy_that_failed_beside_the_steps_raises_later(later):
    copy_stream = CopyStream(CPU, beside=True)
    failed = copy_stream.submit(lambda: 1 / 0)
    failed.exception(timeout=10)
    with pytest.raises(ZeroDivisionError):
        later(copy_stream, failed)
