"""Which block each step of a run trains, and how many steps in a row."""

import statistics
from collections.abc import Callable

from dbkernels.training.schedule import block_index, fewest_steps_per_swap, steps_left
from dbkernels.training.trainer_config import TrainerConfig

TIMED_STEPS = 5  # by which steps_per_swap is found


class BlockOrder:
    """The order of a run's blocks; a block's turn is `steps_per_swap` steps in a row.

    Where the run measures steps_per_swap, it is 0 until enough steps of the first turn were timed.
    It depends on the machine then, so a checkpoint must hold it.
    """

    def __init__(self, config: TrainerConfig, num_blocks: int):
        self._config, self._num_blocks = config, num_blocks
        self._seconds: list[float] = []
        # without swaps there is nothing that longer turns would save
        self.steps_per_swap = config.steps_per_swap or (1 if config.offload == "none" else 0)

    def block(self, step: int) -> int:
        """Index of the block that a step of the run trains."""
        config = self._config
        # until steps_per_swap is known, the first turn goes on
        steps_per_swap = self.steps_per_swap or config.steps
        return block_index(
            step,
            self._num_blocks,
            steps=config.steps,
            order=config.order,
            seed=config.seed,
            steps_per_swap=steps_per_swap,
        )

    def next_block(self, step: int) -> int | None:
        """Index of the block after the turn that a step is in; None where none is known."""
        config, end = self._config, self._config.steps * self._num_blocks
        if not self.steps_per_swap or step >= end:
            return None
        step += steps_left(
            step,
            self._num_blocks,
            steps=config.steps,
            order=config.order,
            steps_per_swap=self.steps_per_swap,
        )
        return self.block(step) if step < end else None

    @property
    def times(self) -> bool:
        """Whether steps have to be timed."""
        return not self.steps_per_swap

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
        if len(self._seconds) < TIMED_STEPS and steps < self._config.steps:
            return False
        # the first one also compiles and warms up
        typical = statistics.median(self._seconds[1:] or self._seconds)
        needed = fewest_steps_per_swap(typical, swap_seconds())
        self.steps_per_swap = min(max(needed, steps), self._config.steps)
        return True
