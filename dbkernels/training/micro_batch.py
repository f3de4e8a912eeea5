"""How much of a batch is on the device at once: less, from the moment that memory runs out."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class MicroBatch:
    """The samples of one backward; a step's gradient is summed over as many as a batch needs.

    Args:
        size:   samples
        batch:  samples of a step
        least:  samples; it is not halved any more
    """

    def __init__(self, size: int, batch: int, *, least: int = 1):
        self.size, self.batch, self._least = size, batch, least

    def attempt(
        self, gradient: Callable[[int], Tensor], undo: Callable[[], None], where: str
    ) -> Tensor:
        """Make a step's gradient, and once more at half the size where memory runs out.

        Args:
            gradient:  made in pieces of so many samples; the same sum for any size
            undo:      frees what an attempt cut short has left
            where:     names the step, for messages
        Returns:
            What `gradient` gave.
        Raises:
            torch.OutOfMemoryError: half the size is too much too, or the least is.
        """
        try:
            return gradient(self.size)
        except torch.OutOfMemoryError:
            undo()
            if self.size <= self._least:
                raise self._error(where, "which cannot be halved") from None
        # here the error is gone, and what the attempt had kept for its backward with it
        told = self._told(where)
        self.size = -(-self.size // 2)
        warnings.warn(f"{told}: they have {self.size} from now on", stacklevel=2)
        try:
            return gradient(self.size)
        except torch.OutOfMemoryError:
            undo()
            raise self._error(where, "halved in this step already") from None

    def _told(self, where: str) -> str:
        return f"out of memory in {where} with batch {self.batch} in micro-batches of {self.size}"

    def _error(self, where: str, reason: str) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(f"{self._told(where)}, {reason}")
