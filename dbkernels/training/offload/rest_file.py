"""The file that a block rests in, read and written in pieces whose checksums stay in memory."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

STAGING_BYTES = 2**23  # of a piece: enough for the bus and the disk, and little beside a block


Held = tuple["RestFile", int, Tensor]  # a piece: of which file, its first byte, what it has


class RestFile:
    """A block's file, which gives the bytes that it was given or says that it cannot.

    Args:
        descriptor:  of the file, which has no name; it is closed with this
        directory:   that it lies in, for messages
        held:        empty; the piece that was read last, of several files that have one for all
    """

    def __init__(self, descriptor: int, directory: Path, held: "list[Held] | None" = None):
        self._descriptor, self._directory = descriptor, directory
        self._held: list[Held] = [] if held is None else held
        self._sums: dict[int, tuple[int, int]] = {}  # first byte -> bytes of the piece, checksum

    def close(self) -> None:
        os.close(self._descriptor)

    def pieces(self) -> list[tuple[int, int]]:
        """First byte and number of bytes of each piece, in order."""
        return [(first, nbytes) for first, (nbytes, _) in sorted(self._sums.items())]

    def seal(self, *ends: int) -> None:
        """Take what the file has now as what it was given; no piece goes across an end."""
        self._held.clear()
        self._sums, begin = {}, 0
        for end in ends:
            for first in range(begin, end, STAGING_BYTES):
                piece = torch.empty(min(STAGING_BYTES, end - first), dtype=torch.uint8)
                self._read(piece, first)
                self._sums[first] = len(piece), zlib.crc32(piece.numpy().data)
            begin = end

    def write(self, piece: Tensor, first: int) -> None:
        """Write one of the pieces.

        Args:
            piece:  (n,) uint8 of the host
            first:  its first byte in the file
        """
        self._held.clear()
        data, done = memoryview(piece.numpy().data), 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], first + done)
        self._sums[first] = len(data), zlib.crc32(data)

    def fill(self, piece: Tensor, first: int) -> None:
        """Read one of the pieces to where it is wanted.

        Raises:
            ValueError: the file was cut short or has other bytes.
        """
        self._read(piece, first)
        if self._sums[first] != (len(piece), zlib.crc32(piece.numpy().data)):
            raise ValueError(
                f"a block's file in {self._directory} must hold what was written to it, got other "
                f"bytes between {first} and {first + len(piece)}"
            )

    def read(self, first: int, nbytes: int) -> Iterator[Tensor]:
        """Bytes of the file, (n,) uint8 each; pieces that have them are checked as a whole.

        Raises:
            ValueError: the file was cut short or has other bytes.
        """
        for start, size in self.pieces():
            low, high = max(first, start), min(first + nbytes, start + size)
            if low >= high:
                continue
            if not self._held or self._held[0][:2] != (self, start):
                self._held.clear()
                piece = torch.empty(size, dtype=torch.uint8)
                self.fill(piece, start)
                self._held.append((self, start, piece))
            yield self._held[0][2][low - start : high - start]

    def _read(self, piece: Tensor, first: int) -> None:
        data, done = memoryview(piece.numpy().data), 0
        while done < len(data):
            got = os.preadv(self._descriptor, [data[done:]], first + done)
            if not got:
                raise ValueError(
                    f"a block's file in {self._directory} must have {first + len(data)} bytes, "
                    f"got {os.fstat(self._descriptor).st_size}: it was cut short"
                )
            done += got
