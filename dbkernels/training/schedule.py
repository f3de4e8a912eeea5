"""Everything of a run that is counted in steps: learning rate, moving average, order of blocks."""

import math
from typing import Literal

import torch

from dbkernels.ops.philox import stream_seed

Decay = Literal["constant", "cosine"]
Order = Literal["shuffled", "sequential"]
SWAP_SHARE = 0.05
ORDER_KEY = 2**62  # keeps the stream of the blocks' order apart from the blocks' own


def learning_rate(step: int, total: int, *, lr: float, warmup: int, decay: Decay) -> float:
    """The rate of one update.

    Args:
        step:    updates that the parameters have had; 0 for the first
        total:   updates that they will have had at the end
        lr:      the highest rate
        warmup:  updates over which the rate rises linearly
        decay:   constant, or cosine down to 0 at `total`
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if decay == "constant":
        return lr
    done = (step - warmup) / max(1, total - warmup)
    return lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


def average_decay(step: int, decay: float) -> float:
    """Decay of an exponential moving average, lower while few steps have been taken.

    Args:
        step:   updates that the averaged parameters have had, of their own
        decay:  in the long run; below 1
    """
    return min(decay, (1 + step) / (10 + step))


def block_index(
    step: int, num_blocks: int, *, steps: int, order: Order, seed: int, steps_per_swap: int = 1
) -> int:
    """Which block a step of the run trains; every block has had `steps` steps at the end.

    Args:
        step:            of the run, below steps * num_blocks
        num_blocks:      number of blocks
        steps:           of each block
        order:           shuffled trains every block once in each sweep, in an order of its own;
                         sequential takes all steps of a block before the next, most noise first
        seed:            of the run
        steps_per_swap:  of a block in a row where shuffled; in the last sweep those still left
    """
    if order == "sequential":
        return step // steps
    sweep, place = divmod(step, num_blocks * steps_per_swap)
    generator = torch.Generator().manual_seed(stream_seed(seed, ORDER_KEY, sweep))
    order_of_sweep = torch.randperm(num_blocks, generator=generator)
    return int(order_of_sweep[place // min(steps_per_swap, steps - sweep * steps_per_swap)])


def steps_left(step: int, num_blocks: int, *, steps: int, order: Order, steps_per_swap: int) -> int:
    """Steps from this one, itself counted, to the end of its turn. Args as for `block_index`."""
    if order == "sequential":
        return steps - step % steps
    sweep, place = divmod(step, num_blocks * steps_per_swap)
    length = min(steps_per_swap, steps - sweep * steps_per_swap)
    return length - place % length


def fewest_steps_per_swap(step_seconds: float, swap_seconds: float) -> int:
    """The fewest steps in a row of which swaps take at most SWAP_SHARE of the time.

    Args:
        step_seconds:  of one step
        swap_seconds:  to take one block off the device and bring another
    """
    return max(1, math.ceil(swap_seconds * (1 - SWAP_SHARE) / SWAP_SHARE / step_seconds))
