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
from dbkernels.memory.measure import out_of_memory

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


Pieces = Callable[[int], Iterator[Batch]]  # a step's samples in order, so many at a time


def read_pieces(data: Data, indices: Tensor, put: Put, size: int) -> Iterator[Batch]:
    """A step's samples, read piece by piece: no more of them are on the device than one piece.

    Args:
        data:     gives batches by sample index
        indices:  (B,) int64, of the step
        put:      brings them to the device
        size:     samples of a piece
    """
    return (data.batch(piece, put) for piece in indices.split(size))


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Views of the samples of a batch in their order, so many at a time."""
    for first in range(0, len(next(iter(batch.values()))), size):
        yield {name: tensor[first : first + size] for name, tensor in batch.items()}


class HeldSamples:
    """Samples in tensors that stay, where a captured graph finds those of each step."""

    def __init__(self) -> None:
        self._batch: Batch = {}

    def fill(self, batch: Batch) -> None:
        """Put the samples of a step in the place of the last one's, of the same shapes."""
        for name, tensor in batch.items():
            if name not in self._batch:
                self._batch[name] = torch.empty_like(tensor)
            self._batch[name].copy_(tensor)

    def pieces(self, size: int) -> Iterator[Batch]:
        """As `read_pieces`, views of what is held."""
        return cut(self._batch, size)


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
        final = "which cannot be halved" if self.size <= self._least else ""
        while True:
            told = f"{where} with batch {self.batch} in micro-batches of {self.size}"
            try:
                return gradient(self.size)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error) is None:
                    raise
                undo()
                if final:
                    raise torch.OutOfMemoryError(f"out of memory in {told}, {final}") from None
            # here the error is gone, and what the attempt had kept for its backward with it
            self.size, final = -(-self.size // 2), "halved in this step already"
            message = f"out of memory in {told}: they have {self.size} from now on"
            warnings.warn(message, stacklevel=2)


class Pending:
    """A step that was launched: its numbers are on their way to the host.

    Args:
        row:      what the host knows of it, with places for "loss" and "grad_norm"
        numbers:  these two, and where several processes train how many of them were asked to end;
                  () each, of one dtype and one device; what they hold now is read
        refused:  (loss, norm) -> the error of a step of which one is not finite; it undoes what
                  the host had counted of this step and of later ones
    """

    def __init__(
        self,
        row: Row,
        numbers: Sequence[Tensor],
        refused: Callable[[float, float], FloatingPointError],
    ):
        self._row, self._refused = row, refused
        self.is_asked = False  # whether a process was asked to end before this step, once read
        self._numbers: Sequence[Tensor] | Tensor = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers[0].is_cuda:
            together = torch.stack(list(numbers))
            # in pages that are locked; to others the copy would wait for the device
            host = torch.empty(len(numbers), dtype=together.dtype, pin_memory=True)
            self._numbers = host.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.current_stream(together.device).record_event()

    def wait(self) -> None:
        """Return when its numbers are there, and so when all launched before them is done."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def row(self) -> Row:
        """The step's row, when the device is done with it.

        Rows are read in the order of their steps. When one has raised, those of steps that were
        launched after it are of no use: these updated nothing.

        Raises:
            FloatingPointError: the loss or its gradient is not finite.
        """
        self.wait()
        loss, norm, *asked = (float(number) for number in self._numbers)
        self.is_asked = any(asked)
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
        self.is_asked = False
        """Whether a row that was read says that the run is to end."""

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    def add(self, pending: Pending) -> None:
        """Take a step that was launched, and hand on the row of the one before it.

        Raises:
            FloatingPointError: that row's; the step after it updated nothing, and is forgotten.
        """
        last, self._last = self._last, pending
        try:
            self._hand_on(last)
        except FloatingPointError:
            self._last = None
            raise

    def settle(self) -> None:
        """Hand on what is left; the device is then done with every step.

        Raises:
            FloatingPointError: the row's.
        """
        last, self._last = self._last, None
        self._hand_on(last)

    def _hand_on(self, pending: Pending | None) -> None:
        if pending is None:
            return
        row = pending.row()
        self.is_asked |= pending.is_asked
        self._take(row)
