"""A step on its way: its samples go to the device, and its numbers come to the host later.

The numbers set out for the host behind the step that made them, and the host launches the next step
meanwhile. It reads them when that is done, so the device never waits for the host.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dbkernels.data.images import Batch, Data, Put

Row = dict[str, float | int]


class Staging:
    """Puts tensors on a device: for a GPU through page-locked memory and on a stream of its own.

    The host waits for no copy, and a copy for no step. Locked pages are torch's own: it uses them
    again when what was copied from them has arrived.

    Args:
        device:  to put them on
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device, for the ops that the current stream runs from now on.

        Where the device is the host it is the tensor itself. On a GPU the host may write over its
        own at once.
        """
        if self._stream is None:
            return tensor.to(self._device)
        locked = tensor.pin_memory()
        steps = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            arrived = locked.to(self._device, non_blocking=True)
        steps.wait_stream(self._stream)
        # its memory is the copies' to use again, which must not overtake the steps that read it
        arrived.record_stream(steps)
        return arrived


class ReadSamples:
    """A step's samples, read piece by piece: no more of them are on the device than one piece.

    Args:
        data:     gives batches by sample index
        indices:  (B,) int64, of the step
        put:      brings them to the device
    """

    def __init__(self, data: Data, indices: Tensor, put: Put):
        self._data, self._indices, self._put = data, indices, put

    def pieces(self, size: int) -> Iterator[Batch]:
        """All of them in order, `size` at a time; again if they are asked for again."""
        for piece in self._indices.split(size):
            yield self._data.batch(piece, self._put)


class HeldSamples:
    """Samples in tensors that stay, where a captured graph finds those of each step."""

    def __init__(self):
        self._batch: Batch = {}

    def fill(self, batch: Batch) -> None:
        """Put the samples of a step in the place of the last one's, of the same shapes."""
        for name, tensor in batch.items():
            if name in self._batch:
                self._batch[name].copy_(tensor)
            else:
                self._batch[name] = tensor.clone()

    def pieces(self, size: int) -> Iterator[Batch]:
        """As `ReadSamples.pieces`, views of what is held."""
        count = len(next(iter(self._batch.values())))
        for first in range(0, count, size):
            yield {name: tensor[first : first + size] for name, tensor in self._batch.items()}


Samples = ReadSamples | HeldSamples


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
