import time

import pytest
import torch

from dbkernels.training.threads import fastest_threads


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({1: 0.08, 2: 0.04, 4: 0.02}, 4),
        ({1: 0.08, 2: 0.02, 4: 0.04}, 2),
        ({1: 0.02, 2: 0.08, 4: 0.3}, 1),
        # a little is not worth a thread
        ({1: 0.040, 2: 0.039, 4: 0.038}, 1),
    ],
)
def test_a_step_has_the_fewest_threads_that_make_it_fast(seconds, fastest):
    found = fastest_threads(lambda: time.sleep(seconds[torch.get_num_threads()]))
    assert found == fastest and torch.get_num_threads() == 4


def test_every_number_is_warmed_up_and_one_slow_round_does_not_count():
    seen = []

    def step():
        count = torch.get_num_threads()
        seen.append(count)
        # the first round of all, and one later
        slow = seen.count(count) == 1 or (count == 4 and seen.count(count) == 3)
        time.sleep(0.2 if slow else {1: 0.05, 2: 0.05, 4: 0.01}[count])

    assert fastest_threads(step) == 4
    assert seen == [1] * 4 + [2] * 4 + [4] * 4


def test_a_long_step_runs_twice_with_each_number(monkeypatch):
    monkeypatch.setattr("dbkernels.training.threads.LONG", 0.01)
    calls = []
    fastest_threads(lambda: (calls.append(torch.get_num_threads()), time.sleep(0.02)))
    assert calls == [1, 1, 2, 2, 4, 4]


def test_three_threads_are_tried_where_there_are_three_and_one_needs_no_try():
    calls = []
    torch.set_num_threads(3)
    fastest_threads(lambda: calls.append(torch.get_num_threads()))
    assert sorted(set(calls)) == [1, 2, 3]
    torch.set_num_threads(1)
    assert fastest_threads(calls.clear) == 1 and calls


def test_the_number_is_set_again_after_an_error():
    def broken():
        raise ValueError("broken image")

    with pytest.raises(ValueError, match="broken image"):
        fastest_threads(broken)
    assert torch.get_num_threads() == 4
