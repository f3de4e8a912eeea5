"""Tokens of text in windows of one length, read from a directory when they are asked for.

No file is mapped into memory: what is read of it stays in the system's cache all the same, and a
file that becomes shorter is an error of one sentence, which a mapped one would not be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dbkernels.data.formats import MissingSplit
from dbkernels.data.images import Batch, Put, check_indices
from dbkernels.data.rows import RowsOnDisk, spaced
from dbkernels.data.token_files import ENDS, NAME, SPLITS, check_ids, read_description
from dbkernels.settings import check_choice, check_number

PIECE = 2**20  # tokens that are read at a time
CHECKED = 2**29  # tokens that are read when a file is opened: all of a file that has no more


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one length over documents, of which none reaches into two.

    A document of n tokens has windows from its start on, `stride` apart, and one more that ends
    with it where those leave tokens over. A document that is shorter than a window has none.

    Args:
        ends:    (documents,) int64, rising: tokens to the end of each document
        length:  tokens of a window
        stride:  tokens from one window's start to the next one's
    """

    ends: np.ndarray
    length: int
    stride: int

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each document that has a window: where the first one starts and where the last one
        does, and how many windows come before it; with the number of all behind the latter."""
        starts = np.concatenate([[0], self.ends[:-1]])
        kept = self.ends - starts >= self.length
        first, last = starts[kept], self.ends[kept] - self.length
        counts = 1 - (first - last) // self.stride  # rounded up: one more where tokens are over
        return first, last, np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._spans[2][-1])

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """The first token of each of these windows, (B,) int64."""
        first, last, before = self._spans
        document = np.searchsorted(before, indices, side="right") - 1
        offset = (indices - before[document]) * self.stride
        return np.minimum(first[document] + offset, last[document])


@dataclass(frozen=True, eq=False)
class TokenData:
    """One split of a directory of tokens, in windows that are read when they are asked for."""

    tokens: RowsOnDisk  # (N,) uint16 or uint32, each below the vocabulary
    windows: Windows
    vocabulary: int  # number of ids; the mask token of masked diffusion has the next one
    characters_per_token: float  # of the split's text, so that bits per token become bits of each

    @property
    def length(self) -> int:
        """Tokens of a window, S."""
        return self.windows.length

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`: "token", (B, S) int64.

        Raises:
            ValueError: the indices are malformed, the file cannot be read, or an id in it is not in
                the vocabulary.
        """
        indices = check_indices(indices, len(self))
        starts = self.windows.starts(indices.numpy())
        found = self.tokens.runs(starts, self.length)
        if found.max(initial=0) >= self.vocabulary:
            for start, window in zip(starts, found, strict=True):
                check_ids(window, self.vocabulary, str(self.tokens.path), first=int(start))
        # as they are stored: a quarter or a half of what they are in int64
        return {"token": put(torch.from_numpy(found)).to(torch.int64)}


def open_tokens(
    source: str | Path,
    split: Literal["train", "test"] = "train",
    *,
    length: int,
    vocabulary: int | None = None,
    stride: int = 0,
) -> TokenData:
    """Open one split of a directory that `tokenize` or `write_tokens` has written.

    Documents never share a window: where text is to run on, `tokenize --join` makes one document of
    it, with what stands between documents in place.

    Args:
        source:      the directory
        split:       "train" or "test"
        length:      tokens of a window, S
        vocabulary:  number of ids that the reader has; None takes the directory's
        stride:      tokens from one window's start to the next one's, of one document; 0 lays them
                     end to end. The last one ends with its document either way
    Returns:
        The split. Documents that are shorter than a window are left out.
    Raises:
        MissingSplit: the directory has none of that split.
        ValueError: the source, its files or its tokens cannot be used, no document is as long as
            a window, or the vocabulary is another.
    """
    check_choice("split", split, SPLITS)
    check_number("length", length, 1)
    check_number("stride", stride, 0)
    directory = Path(source)
    told = read_description(directory)
    if vocabulary not in (None, told.vocabulary):
        raise ValueError(
            f"vocabulary must be that of {directory}, {told.vocabulary} ids of tokenizer "
            f"{told.tokenizer}, got {vocabulary}"
        )
    if split not in told.splits:
        raise MissingSplit(f"{directory} has no {split} split: {NAME} names {[*told.splits]}")
    counts = told.splits[split]
    tokens = _opened(directory / f"{split}.bin", counts.tokens, told.dtype)
    ends = _ends(_opened(directory / f"{split}.ends", counts.documents, ENDS), counts.tokens)
    windows = Windows(ends, length, stride or length)
    if not len(windows):
        longest = np.diff(ends, prepend=0).max(initial=0)
        raise ValueError(
            f"length must be at most {longest}, as the longest document of the {split} split of "
            f"{directory} has, got {length}"
        )
    data = TokenData(tokens, windows, told.vocabulary, counts.characters / counts.tokens)
    for start, piece in pieces(tokens, CHECKED):
        check_ids(piece, told.vocabulary, str(tokens.path), first=start)
    return data


def pieces(tokens: RowsOnDisk, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Evenly spaced pieces of a file with where each begins: all of it, or so many tokens."""
    count = -(-len(tokens) // PIECE)
    for index in spaced(count, max(1, most // PIECE)):
        start = int(index) * PIECE
        yield start, tokens.runs([start], min(PIECE, len(tokens) - start))[0]


def _opened(path: Path, count: int, dtype: np.dtype) -> RowsOnDisk:
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes, as {NAME} says, got {size}")
    if not count:
        raise ValueError(f"{path} is empty: the {path.stem} split has no text")
    return RowsOnDisk(path, (count,), dtype)


def _ends(rows: RowsOnDisk, tokens: int) -> np.ndarray:
    ends = rows.runs([0], len(rows))[0]
    if np.diff(ends, prepend=0).min() < 1 or ends[-1] != tokens:
        raise ValueError(f"{rows.path} must rise from above 0 to the number of tokens, {tokens}")
    return ends.astype(np.int64, copy=False)
