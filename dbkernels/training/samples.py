"""The samples of one step, on the device in pieces or held there as a whole."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from dbkernels.data.images import ImageData, Put
from dbkernels.models.family import Batch


class Samples(Protocol):
    """Gives a step's samples, and again if they are asked for again."""

    def pieces(self, size: int) -> Iterator[Batch]:
        """All of them in order, `size` at a time."""
        ...


class ReadSamples:
    """Samples that are read piece by piece: no more of them are on the device than one piece.

    Args:
        data:     gives batches by sample index
        indices:  (B,) int64, of the step
        put:      brings them to the device
    """

    def __init__(self, data: ImageData, indices: Tensor, put: Put):
        self._data, self._indices, self._put = data, indices, put

    def pieces(self, size: int) -> Iterator[Batch]:
        """As `Samples.pieces`."""
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
        """As `Samples.pieces`, views of what is held."""
        count = len(next(iter(self._batch.values())))
        for first in range(0, count, size):
            yield {name: tensor[first : first + size] for name, tensor in self._batch.items()}
