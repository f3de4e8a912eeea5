"""Which layers form a block, and which noise each block is trained on and serves.

Shing et al. 2026 (arXiv:2506.14202), section 3.3: the first layers meet the most noise. The order
"deepest" gives it to the last ones, for a model whose later layers know more of the condition.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import get_args

import numpy as np

from dbkernels.diffusion.process import Interval, NoiseOrder, Process, Scheme
from dbkernels.settings import check_choice


@dataclass(frozen=True)
class Block:
    """Layers trained together, and their noise.

    index:          position in the order in which the signal meets the blocks
    layers:         indices into model.layers, in order; a repeat runs the layer again
    noise:          what the block serves at inference; the blocks' intervals tile the range
    trained_noise:  what it is trained on: noise widened by the overlap
    """

    index: int
    layers: tuple[int, ...]
    noise: Interval
    trained_noise: Interval


def partition(
    layers: int | Sequence[int],
    num_blocks: int,
    process: Process,
    *,
    split: Sequence[int] | None = None,
    scheme: Scheme = "equal_probability",
    gamma: float = 0.05,
    noise_order: NoiseOrder = "first",
) -> tuple[Block, ...]:
    """Cut a stack of layers into blocks and give each its interval of noise.

    Args:
        layers:      number of layers, or the layer indices in running order (they may repeat)
        num_blocks:  number of blocks
        process:     gives the intervals and their overlap
        split:       layers per block, the noisiest block first; None splits evenly, and a
                     remainder goes one layer each to the noisiest blocks
        scheme:      how the process cuts its range
        gamma:       overlap, as a share of each interval's own width; 0 for none
        noise_order: which end of the stack meets the most noise: the first layers, or the deepest
    Returns:
        The blocks, the most noise first. Each place of `layers` is in exactly one block.
    Raises:
        ValueError: more blocks than layers, a split that does not add up, a negative gamma, or an
            unknown order.
    """
    check_choice("noise_order", noise_order, get_args(NoiseOrder))
    order = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
    if not 1 <= num_blocks <= len(order):
        raise ValueError(
            f"num_blocks must be between 1 and the {len(order)} layers, got {num_blocks}"
        )
    # of parts that cannot be even, the first are longer by one
    even = [len(part) for part in np.array_split(order, num_blocks)]
    sizes = even if split is None else list(split)
    if len(sizes) != num_blocks or sum(sizes) != len(order) or min(sizes) < 1:
        raise ValueError(
            f"split must give {num_blocks} blocks at least one layer each and add up to "
            f"{len(order)} layers, got {sizes} with sum {sum(sizes)}"
        )
    running, step = iter(order), 1 if noise_order == "first" else -1
    parts = [tuple(islice(running, size)) for size in sizes[::step]][::step]
    intervals = process.intervals(num_blocks, scheme)
    return tuple(
        Block(index, part, interval, process.widen(interval, gamma))
        for index, (part, interval) in enumerate(zip(parts, intervals, strict=True))
    )


def block_at(blocks: Iterable[Block], level: float) -> Block:
    """The block that serves a noise level; training, sampling and evaluation all ask here.

    A level on a boundary belongs to the block below it, whose interval it begins. The published
    code routes such levels otherwise: four levels of three blocks never visit the middle one there.

    Args:
        blocks:  all blocks of a partition
        level:   sigma in units of z, or mask time in [0, 1]
    Raises:
        ValueError: the level lies outside the blocks' range.
    """
    # compared as float32, so that a level which passed through a tensor keeps its block
    rounded = np.float32(level)
    every = list(blocks)
    low, high = every[-1].noise.low, every[0].noise.high
    if not np.float32(low) <= rounded <= np.float32(high):
        raise ValueError(f"level must lie in [{low}, {high}], got {level}")
    return next(block for block in reversed(every) if rounded <= np.float32(block.noise.high))
