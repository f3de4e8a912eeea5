"""Which block each step of a run trains, and how many steps in a row."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dbkernels.ops.philox import stream_seed
from dbkernels.training.trainer_config import TrainerConfig

SWAP_SHARE = 0.05
TIMED_STEPS = 5  # by which steps_per_swap is found
ORDER_KEY = 2**62  # keeps the stream of the blocks' order apart from the blocks' own


class BlockOrder:
    """The order of a run's blocks; a block's turn is some steps in a row.

    Every block has had `steps` steps at the end. Where the run measures steps_per_swap, it is 0
    until enough steps of the first turn were timed, which are waited for. It depends on the machine
    then, so a checkpoint must hold it.

    Args:
        blocks:      indices of the blocks, in the order in which sequential training takes them
        config:      steps of each block, order, seed, and steps_per_swap, which is 1 in effect
                     where no block leaves the device
    """

    def __init__(self, blocks: Sequence[int], config: TrainerConfig):
        self._blocks, self._num_blocks, self._steps = blocks, len(blocks), config.steps
        self._sequential, self._seed = config.order == "sequential", config.seed
        self._shuffled = sorted(blocks)
        self._seconds: list[float] = []
        # without swaps there is nothing that longer turns would save
        self.steps_per_swap = config.steps_per_swap or (0 if config.offload != "none" else 1)

    def _turn(self, step: int) -> tuple[int, int, int]:
        """Of the turn that a step is in: its sweep, its place there, and its steps from this on."""
        # one sweep is all where it is sequential, and until steps_per_swap is known
        turn = self._steps if self._sequential else self.steps_per_swap or self._steps
        sweep, place = divmod(step, self._num_blocks * turn)
        length = min(turn, self._steps - sweep * turn)
        return sweep, place // length, length - place % length

    def block(self, step: int) -> int:
        """Index of the block that a step of the run trains."""
        sweep, place, _ = self._turn(step)
        if self._sequential:
            return self._blocks[place]
        generator = torch.Generator().manual_seed(stream_seed(self._seed, ORDER_KEY, sweep))
        return self._shuffled[int(torch.randperm(self._num_blocks, generator=generator)[place])]

    def coming(self, step: int, own: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Block of each step of the run from one on, and which of the block's own steps it is.

        Args:
            step:  of the run, the first
            own:   steps that each block has had by then, by its index
        """
        counts = dict(own)
        for each in range(step, self._steps * self._num_blocks):
            block = self.block(each)
            yield block, counts[block]
            counts[block] += 1

    def next_block(self, step: int) -> int | None:
        """Index of the block after the turn that a step is in; None where none is known."""
        end = self._steps * self._num_blocks
        if not self.steps_per_swap or step >= end:
            return None
        *_, left = self._turn(step)
        return self.block(step + left) if step + left < end else None

    def timed(self, steps: int, seconds: float, swap_seconds: Callable[[], float]) -> bool:
        """Find steps_per_swap by the time of a step, once enough of them were timed.

        Args:
            steps:         of the run so far
            seconds:       of the last one
            swap_seconds:  times a swap
        Returns:
            Whether steps_per_swap was found now.
        """
        if self.steps_per_swap:
            return False
        self._seconds.append(seconds)
        if len(self._seconds) < TIMED_STEPS and steps < self._steps:
            return False
        # the first one also compiles and warms up
        typical = statistics.median(self._seconds[1:] or self._seconds)
        needed = fewest_steps_per_swap(typical, swap_seconds())
        self.steps_per_swap = min(max(needed, steps), self._steps)
        return True


def fewest_steps_per_swap(step_seconds: float, swap_seconds: float) -> int:
    """The fewest steps in a row of which swaps take at most SWAP_SHARE of the time.

    Args:
        step_seconds:  of one step
        swap_seconds:  to take one block off the device and bring another
    """
    return max(1, math.ceil(swap_seconds * (1 - SWAP_SHARE) / SWAP_SHARE / step_seconds))
