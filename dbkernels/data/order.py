"""An order of so many samples that nobody lists it: each place is computed when it is asked for.

    (a, b) -> (b, a ^ f(b)),    f = a word of Philox under the order's seed

A round on the halves of a number can be undone, whatever f is (a Feistel network), so rounds give a
permutation of all numbers of so many bits. One that leads outside the samples is permuted again
until it is inside, which leaves a permutation of these (Black & Rogaway 2002, "Ciphers with
arbitrary finite domains"). At least a quarter of all numbers is inside.
"""

import torch
from torch import Tensor

from dbkernels.ops.philox import key_words, philox

ROUNDS = 6


def samples_at(places: Tensor, count: int, seed: int) -> Tensor:
    """Samples at some places of an order.

    Args:
        places:  (n,) int64, below count
        count:   samples of the data set, at most 2**62
        seed:    names the order
    Returns:
        (n,) int64, below count: another one for each place.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    samples = _permuted(places, half, seed)
    while (outside := samples >= count).any():
        samples[outside] = _permuted(samples[outside], half, seed)
    return samples


def _permuted(numbers: Tensor, half: int, seed: int) -> Tensor:
    """A permutation of the numbers of twice as many bits as a half has."""
    mask = 2**half - 1
    a, b = numbers >> half, numbers & mask
    for each in range(ROUNDS):
        word, *_ = philox(b, torch.full_like(b, each), 0, 0, *key_words(seed))
        a, b = b, a ^ (word & mask)
    return (a << half) | b
