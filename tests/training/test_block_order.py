from itertools import pairwise

import pytest
from training.tiny import make_blocks

from dbkernels.training.block_order import TIMED_STEPS, BlockOrder, fewest_steps_per_swap
from dbkernels.training.trainer_config import TrainerConfig


def block_order(num_blocks=3, **settings):
    defaults = {"steps": 40, "seed": 0, "steps_per_swap": 1, "offload": "cpu"}
    return BlockOrder(range(num_blocks), TrainerConfig(**defaults | settings))


def blocks(num_blocks, steps, **settings):
    """Of every step of a run."""
    made = block_order(num_blocks, steps=steps, **settings)
    return [made.block(step) for step in range(num_blocks * steps)]


def never():
    raise AssertionError("a swap was timed")


# the order


def test_sequential_order_begins_with_the_first_layers_where_the_deepest_meet_the_most_noise():
    config = TrainerConfig(steps=2, order="sequential")
    deepest = make_blocks(noise_order="deepest")
    order = BlockOrder(deepest.in_running_order, config)
    trained = [deepest[order.block(step)].layers for step in range(6)]
    assert trained == [(0,), (0,), (1,), (1,), (2,), (2,)]


def test_sequential_order_finishes_one_block_before_the_next():
    assert blocks(3, steps=2, order="sequential", steps_per_swap=5) == [0, 0, 1, 1, 2, 2]


def test_order_depends_on_the_seed_and_on_the_sweep():
    orders = [blocks(4, steps=50, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][4 * sweep : 4 * sweep + 4]) for sweep in range(50)}) > 10


@pytest.mark.parametrize("steps, steps_per_swap", [(50, 1), (9, 3), (10, 4), (3, 7), (5, 5)])
def test_steps_per_swap_are_of_one_block_in_a_row_and_the_last_sweep_has_those_left(
    steps, steps_per_swap
):
    order, first = blocks(4, steps=steps, steps_per_swap=steps_per_swap), 0
    assert all(order.count(block) == steps for block in range(4))
    while first < len(order):
        length = min(steps_per_swap, steps - first // 4)
        sweep = order[first : first + 4 * length]
        assert sorted(sweep[::length]) == [0, 1, 2, 3]
        assert sweep == [block for block in sweep[::length] for _ in range(length)]
        first += 4 * length


def test_sweeps_of_longer_turns_come_in_the_same_order():
    longer = blocks(4, steps=6, seed=3, steps_per_swap=3)
    assert longer[::3] == blocks(4, steps=6, seed=3)[:8]


@pytest.mark.parametrize(
    "settings", [{"steps_per_swap": 3}, {"steps_per_swap": 7}, {"order": "sequential"}]
)
def test_the_next_block_is_that_of_the_next_turn(settings):
    made, order = block_order(steps=8, **settings), blocks(3, steps=8, **settings)
    assert sorted(order) == [0] * 8 + [1] * 8 + [2] * 8
    length = settings.get("steps_per_swap", 8)
    lengths = [b - a for a, b in pairwise([*range(0, 8, length), 8]) for _ in range(3)]
    for turn, length in enumerate(lengths):
        start = sum(lengths[:turn])
        assert len(set(order[start : start + length])) == 1
        following = order[start + length] if start + length < 24 else None
        assert {made.next_block(step) for step in range(start, start + length)} == {following}
    assert made.next_block(24) is None


# how long a turn is


def test_steps_per_swap_are_the_fewest_that_keep_swaps_within_their_share():
    assert fewest_steps_per_swap(1.0, 0.0) == 1
    assert fewest_steps_per_swap(0.25, 0.25) == 19
    for step, swap in ((0.3, 0.1), (0.01, 0.7), (2.0, 0.001)):
        length = fewest_steps_per_swap(step, swap)
        assert swap <= 0.05 * (swap + length * step)
        assert length == 1 or swap > 0.05 * (swap + (length - 1) * step)


def test_nothing_is_timed_where_the_length_is_given_or_nothing_is_swapped():
    made = block_order(steps_per_swap=6)
    assert not any(made.timed(step, 1.0, never) for step in range(1, 20))
    assert made.steps_per_swap == 6
    made = block_order(steps_per_swap=0, offload="none")
    assert made.steps_per_swap == 1 and not made.timed(1, 1.0, never)


def test_the_length_keeps_swaps_within_their_share_of_the_time():
    made = block_order(steps_per_swap=0)
    first = made.block(0)
    for step, seconds in enumerate((9.0, 0.25, 0.75, 5.0), start=1):
        assert made.steps_per_swap == 0 and not made.timed(step, seconds, never)
        assert made.block(step) == first and made.next_block(step) is None
    # a swap of 0.5 s beside 19 steps of 0.5 s, the median of all but the first
    assert made.timed(5, 0.25, lambda: 0.5)
    assert made.steps_per_swap == 19
    assert {made.block(step) for step in range(19)} == {first} != {made.block(19)}
    assert not made.timed(6, 1.0, never)


# no less than the steps done, no more than all; of a run too short to be timed one turn each
@pytest.mark.parametrize(
    "steps, swap_seconds, expected",
    [(40, 0.0, 5), (40, 1e-9, 5), (40, 0.5, 10), (40, 99.0, 40), (1, 0.0, 1), (3, 0.0, 3)],
)
def test_the_length_lies_between_the_steps_done_and_all(steps, swap_seconds, expected):
    made, count = block_order(steps_per_swap=0, steps=steps), min(steps, TIMED_STEPS)
    found = [made.timed(step, 1.0, lambda: swap_seconds) for step in range(1, count + 1)]
    assert found == [False] * (count - 1) + [True]
    assert made.steps_per_swap == expected
