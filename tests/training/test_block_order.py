from itertools import pairwise

import pytest

from dbkernels.training.block_order import TIMED_STEPS, BlockOrder


def block_order(num_blocks=3, **settings):
    defaults = {"steps": 40, "order": "shuffled", "seed": 0, "steps_per_swap": 1, "swaps": True}
    return BlockOrder(num_blocks, **defaults | settings)


def never():
    raise AssertionError("a swap was timed")


@pytest.mark.parametrize(
    "settings", [{"steps_per_swap": 3}, {"steps_per_swap": 7}, {"order": "sequential"}]
)
def test_the_next_block_is_that_of_the_next_turn(settings):
    plan = block_order(steps=8, **settings)
    order = [plan.block(step) for step in range(24)]
    assert sorted(order) == [0] * 8 + [1] * 8 + [2] * 8
    length = settings.get("steps_per_swap", 8)
    ends = [0, *range(length, 8, length), 8]
    lengths = [b - a for a, b in pairwise(ends) for _ in range(3)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        assert len(set(order[start : start + length])) == 1
        following = order[start + length] if start + length < 24 else None
        for step in range(start, start + length):
            assert plan.next_block(step) == following
    assert plan.next_block(24) is None


def test_a_given_length_stays_and_times_no_swap():
    plan = block_order(steps_per_swap=6)
    assert not any(plan.timed(step, 1.0, never) for step in range(1, 20))
    assert plan.steps_per_swap == 6


def test_nothing_is_timed_where_nothing_is_swapped():
    plan = block_order(steps_per_swap=0, swaps=False)
    assert plan.steps_per_swap == 1 and not plan.timed(1, 1.0, never)


def test_the_length_keeps_swaps_within_their_share_of_the_time():
    plan = block_order(steps_per_swap=0)
    first = plan.block(0)
    for step, seconds in enumerate((9.0, 0.25, 0.75, 5.0), start=1):
        assert plan.steps_per_swap == 0 and not plan.timed(step, seconds, never)
        assert plan.block(step) == first and plan.next_block(step) is None
    # a swap of 0.5 s beside 19 steps of 0.5 s, the median of all but the first
    assert plan.timed(5, 0.25, lambda: 0.5)
    assert plan.steps_per_swap == 19
    assert {plan.block(step) for step in range(19)} == {first} != {plan.block(19)}
    assert not plan.timed(6, 1.0, never)


@pytest.mark.parametrize(
    "swap_seconds, expected", [(0.0, TIMED_STEPS), (1e-9, TIMED_STEPS), (0.5, 10), (99.0, 40)]
)
def test_the_length_is_no_less_than_the_steps_done_and_no_more_than_all(swap_seconds, expected):
    plan = block_order(steps_per_swap=0)
    found = [plan.timed(step, 1.0, lambda: swap_seconds) for step in range(1, TIMED_STEPS + 1)]
    assert found == [False] * 4 + [True]
    assert plan.steps_per_swap == expected


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_too_short_to_be_timed_makes_one_turn_of_each_block(steps):
    plan = block_order(steps_per_swap=0, steps=steps)
    found = [plan.timed(step, 1.0, lambda: 0.0) for step in range(1, steps + 1)]
    assert found == [False] * (steps - 1) + [True]
    assert plan.steps_per_swap == steps
