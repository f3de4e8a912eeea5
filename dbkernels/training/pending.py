"""What a step gives: a row of the log, whose numbers come from the device later.

The numbers set out for the host behind the step that made them, and the host launches the next step
meanwhile. It reads them when that is done, so the device never waits for the host.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Row = dict[str, float | int]


class Numbers:
    """Some numbers of a step, on their way to the host.

    Args:
        numbers:  () each, of one dtype and one device; what they hold now is what is read
    """

    def __init__(self, numbers: Sequence[Tensor]):
        self._numbers, self._arrived = numbers, None
        if numbers[0].is_cuda:
            together = torch.stack(list(numbers))
            # in pages that are locked; to others the copy would wait for the device
            host = torch.empty(len(numbers), dtype=together.dtype, pin_memory=True)
            self._numbers = host.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.current_stream(together.device).record_event()

    def wait(self) -> None:
        """Return when they are there, and so when all that was launched before them is done."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> list[float]:
        """Their values, when they are there."""
        self.wait()
        return [float(number) for number in self._numbers]


class Pending:
    """A step that was launched.

    Args:
        row:      what the host knows of it, with places for "loss" and "grad_norm"
        numbers:  these two
        refused:  (loss, norm) -> the error of a step of which one is not finite; it undoes what
                  the host had counted of this step and of later ones
    """

    def __init__(
        self, row: Row, numbers: Numbers, refused: Callable[[float, float], FloatingPointError]
    ):
        self._row, self._numbers, self._refused = row, numbers, refused

    def row(self) -> Row:
        """The step's row, when the device is done with it.

        Rows are read in the order of their steps. When one has raised, those of steps that were
        launched after it are of no use: these updated nothing.

        Raises:
            FloatingPointError: the loss or its gradient is not finite.
        """
        loss, norm = self._numbers.read()
        if not math.isfinite(loss + norm):
            raise self._refused(loss, norm)
        return self._row | {"loss": loss, "grad_norm": norm}


class Rows:
    """Hands on the rows of steps in their order, each when the next step was launched.

    Left as a context, it hands on the last one too, also where a launch has failed.

    Args:
        take:  called with each row
    """

    def __init__(self, take: Callable[[Row], object]):
        self._take = take
        self._last: Pending | None = None

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_) -> None:
        self.settle()

    def add(self, pending: Pending) -> None:
        """Take a step that was launched, and hand on the row of the one before it.

        Raises:
            FloatingPointError: that row's; the step after it updated nothing, and is forgotten.
        """
        self.settle()
        self._last = pending

    def settle(self) -> None:
        """Hand on what is left; the device is then done with every step.

        Raises:
            FloatingPointError: the row's.
        """
        last, self._last = self._last, None
        if last is not None:
            self._take(last.row())
