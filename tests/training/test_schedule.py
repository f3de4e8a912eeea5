import math
from functools import partial

import pytest

from dbkernels.training.block_order import BlockOrder, fewest_steps_per_swap
from dbkernels.training.param_group import average_decay, learning_rate


def block_index(step, num_blocks, *, steps, order, seed, steps_per_swap=1):
    made = BlockOrder(
        num_blocks, steps=steps, order=order, seed=seed, steps_per_swap=steps_per_swap, swaps=True
    )
    return made.block(step)


def steps_left(step, num_blocks, *, steps, order, steps_per_swap):
    made = BlockOrder(
        num_blocks, steps=steps, order=order, seed=0, steps_per_swap=steps_per_swap, swaps=True
    )
    return made._turn(step)[2]


def test_constant_rate_after_a_linear_warm_up():
    rate = partial(learning_rate, total=10, lr=1.0, warmup=3, decay="constant")
    assert [rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_last_step():
    rate = partial(learning_rate, total=10, lr=2.0, warmup=2, decay="cosine")
    assert rate(2) == 2.0
    assert rate(6) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert rate(10) == pytest.approx(0.0)
    assert rate(20) == pytest.approx(0.0)


def test_average_forgets_the_start_quickly_and_reaches_its_decay():
    assert average_decay(0, 0.999) == 0.1
    assert average_decay(90, 0.999) == pytest.approx(0.91)
    assert average_decay(10**6, 0.999) == 0.999


def test_shuffled_order_trains_every_block_once_in_each_sweep():
    order = partial(block_index, num_blocks=4, steps=50, order="shuffled", seed=0)
    sweeps = [tuple(order(4 * sweep + place) for place in range(4)) for sweep in range(50)]
    assert all(sorted(sweep) == [0, 1, 2, 3] for sweep in sweeps)
    assert len(set(sweeps)) > 10


def test_sequential_order_finishes_one_block_before_the_next():
    order = [block_index(s, 3, steps=2, order="sequential", seed=0) for s in range(6)]
    assert order == [0, 0, 1, 1, 2, 2]


def test_order_depends_on_the_seed():
    orders = [
        [block_index(s, 5, steps=9, order="shuffled", seed=seed) for s in range(45)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("steps, steps_per_swap", [(50, 1), (9, 3), (10, 4), (3, 7), (5, 5)])
def test_steps_per_swap_are_of_one_block_in_a_row_and_the_last_sweep_has_those_left(
    steps, steps_per_swap
):
    order = [
        block_index(s, 4, steps=steps, order="shuffled", seed=0, steps_per_swap=steps_per_swap)
        for s in range(4 * steps)
    ]
    assert all(order.count(block) == steps for block in range(4))
    first = 0
    while first < len(order):
        length = min(steps_per_swap, steps - first // 4)
        sweep = order[first : first + 4 * length]
        assert sorted(sweep[::length]) == [0, 1, 2, 3]
        assert sweep == [block for block in sweep[::length] for _ in range(length)]
        first += 4 * length


def test_sweeps_of_longer_turns_come_in_the_same_order():
    plain = [block_index(s, 4, steps=6, order="shuffled", seed=3) for s in range(8)]
    longer = [
        block_index(s, 4, steps=6, order="shuffled", seed=3, steps_per_swap=3) for s in range(24)
    ]
    assert longer[::3] == plain


def test_steps_left_count_down_to_the_end_of_a_turn():
    left = partial(steps_left, num_blocks=2, steps=5, steps_per_swap=3)
    assert [left(s, order="shuffled") for s in range(10)] == [3, 2, 1, 3, 2, 1, 2, 1, 2, 1]
    assert [left(s, order="sequential") for s in range(10)] == [5, 4, 3, 2, 1] * 2


def test_steps_per_swap_are_the_fewest_that_keep_swaps_within_their_share():
    assert fewest_steps_per_swap(1.0, 0.0) == 1
    assert fewest_steps_per_swap(0.25, 0.25) == 19
    for step, swap in ((0.3, 0.1), (0.01, 0.7), (2.0, 0.001)):
        length = fewest_steps_per_swap(step, swap)
        assert swap <= 0.05 * (swap + length * step)
        assert length == 1 or swap > 0.05 * (swap + (length - 1) * step)
