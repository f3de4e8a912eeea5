import math
from functools import partial

import pytest

from dbkernels.training.schedule import average_decay, block_index, learning_rate


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


def test_shuffled_order_visits_every_block_once_in_each_sweep():
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
