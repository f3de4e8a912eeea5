import itertools

import numpy as np
import pytest
import torch

from dbkernels.ops.randomness import generator, stream_seed


def test_distinct_keys_have_distinct_seeds():
    # (), (0,) and (0, 0) differ in length alone; 2**32 and -1 would be lost in 32 unsigned bits
    values = (0, 1, -1, 2, 2**32, 2**63 - 1, -(2**63))
    keys = [key for size in range(4) for key in itertools.product(values, repeat=size)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)


def test_order_of_the_key_matters():
    assert stream_seed(1, 2) != stream_seed(2, 1)


def test_seed_is_the_same_on_every_machine():
    assert stream_seed(0, 1, 2) == 4450782424123420391


def test_seed_fits_a_signed_64_bit_integer():
    seeds = [stream_seed(key) for key in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are used


def test_any_kind_of_integer_is_a_key():
    assert stream_seed(np.int32(3), torch.tensor(4)) == stream_seed(3, 4)


@pytest.mark.parametrize("part", [2**63, -(2**63) - 1, 0.5, "1", None])
def test_rejects_what_is_not_a_64_bit_integer(part):
    with pytest.raises(ValueError, match="key must be 64-bit integers, got"):
        stream_seed(0, part)


def test_generator_starts_the_stream_of_its_key():
    draws = [torch.rand(4, generator=generator("cpu", *key)) for key in [(1, 2), (1, 2), (2, 1)]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert generator("cpu", 1, 2).initial_seed() == stream_seed(1, 2)


def test_generator_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    torch.rand(4, generator=generator(torch.device("cpu"), 1))
    assert torch.equal(torch.get_rng_state(), before)
