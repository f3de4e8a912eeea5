"""Which block each step of a run trains: the order of visits, and how long they are."""

import statistics
from collections.abc import Callable

from dbkernels.training.schedule import block_index, steps_left, visit_length
from dbkernels.training.trainer_config import TrainerConfig

TIMED_STEPS = 5  # of the first visit, by which the length of visits is found


class Visits:
    """Answers for a run of `num_blocks` blocks; a visit is `length` steps of one block in a row.

    Where the length is to be found, it is 0 until enough steps of the first visit were timed. It
    depends on the machine then, so a checkpoint must hold it.
    """

    def __init__(self, config: TrainerConfig, num_blocks: int):
        self._config, self._num_blocks = config, num_blocks
        self._seconds: list[float] = []
        # without swaps there is nothing that longer visits would save
        self.length = config.visit or (1 if config.resident == "all" else 0)

    def block(self, step: int) -> int:
        """Index of the block that a step of the run trains."""
        config = self._config
        # until the length is known, the first visit goes on
        visit = self.length or config.steps
        return block_index(
            step,
            self._num_blocks,
            steps=config.steps,
            order=config.order,
            seed=config.seed,
            visit=visit,
        )

    def next_block(self, step: int) -> int | None:
        """Index of the block after the visit that a step is in; None where none is known."""
        config, end = self._config, self._config.steps * self._num_blocks
        if not self.length or step >= end:
            return None
        step += steps_left(
            step, self._num_blocks, steps=config.steps, order=config.order, visit=self.length
        )
        return self.block(step) if step < end else None

    @property
    def times(self) -> bool:
        """Whether steps have to be timed."""
        return not self.length

    def timed(self, steps: int, seconds: float, swap_seconds: Callable[[], float]) -> bool:
        """Find the length by the time of a step, once enough of them were timed.

        Args:
            steps:         of the run so far
            seconds:       of the last one
            swap_seconds:  times a swap
        Returns:
            Whether the length was found now.
        """
        if self.length:
            return False
        self._seconds.append(seconds)
        if len(self._seconds) < TIMED_STEPS and steps < self._config.steps:
            return False
        # the first one also compiles and warms up
        typical = statistics.median(self._seconds[1:] or self._seconds)
        needed = visit_length(typical, swap_seconds())
        self.length = min(max(needed, steps), self._config.steps)
        return True
