"""Which of a call's samples run together, and which results of it are wanted."""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A run of samples, the same ones of each stream; streams lie one after another."""

    start: int
    stop: int
    """One after the last."""
    samples: int
    """Of a whole stream."""
    streams: int

    @property
    def is_all(self) -> bool:
        return self.stop - self.start == self.samples

    @property
    def is_together(self) -> bool:
        """Whether its rows follow each other."""
        return self.is_all or self.streams == 1

    def of(self, t: Tensor | None) -> Tensor | None:
        """Its rows of a tensor with a row, or several, to a sample: a view if they are together,
        else a copy."""
        if t is None or self.is_all:
            return t
        rows = self._rows(t)
        return rows[0] if self.streams == 1 else torch.cat(rows.unbind())

    def put(self, t: Tensor, rows: Tensor) -> None:
        """Write those rows."""
        self._rows(t).copy_(self._by_stream(rows))

    def put_back(self, t: Tensor, rows: Tensor) -> None:
        """Write those rows, which `of` has given, unless they are a view."""
        if not self.is_together:
            self.put(t, rows)

    def _rows(self, t: Tensor) -> Tensor:
        each = len(t) // max(self.streams * self.samples, 1)
        return self._by_stream(t)[:, self.start * each : self.stop * each]

    def _by_stream(self, t: Tensor) -> Tensor:
        return t.view(self.streams, len(t) // self.streams, *t.shape[1:])


class Wanted(NamedTuple):
    """The first so many samples and tokens, whose results alone are wanted; None is all."""

    samples: int | None = None
    tokens: int | None = None

    @property
    def is_all(self) -> bool:
        return self.samples is None and self.tokens is None

    @property
    def is_nothing(self) -> bool:
        """Of a stream that is only keys and values for others."""
        return self.tokens == 0

    def view(self, x: Tensor) -> Tensor:
        """Of (B, T, ...)."""
        return x[: self.samples, : self.tokens]

    def of(self, x: Tensor) -> Tensor:
        """Of (B, T, ...), contiguous; x itself where that is all of it."""
        return x if self.is_all else self.view(x).contiguous()

    def alone(self, x: Tensor) -> Tensor:
        """`of`, without the memory of the others: whoever keeps a view keeps all that it shows."""
        return x if self.is_all else self.view(x).clone()
