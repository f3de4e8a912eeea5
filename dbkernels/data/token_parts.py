"""The tokens of some units of text, which one process makes and another appends to a split."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dbkernels.data.text_files import Unit, texts
from dbkernels.data.token_files import ENDS, SPLITS, dtype_of
from dbkernels.data.tokenizer import Tokenizer, tokenizer_of
from dbkernels.whole_file import whole_file, write_whole


@dataclass(frozen=True)
class Job:
    """Units whose tokens are one part.

    Args:
        index:       of the job, from 0
        units:       in order
        splits:      of each unit, "train" or "test"; None draws the test documents among its own
        test_share:  share of documents that are drawn
        join:        whether documents are joined
        directory:   where the tokenizer is, and the part is to be
        hash:        of the tokenizer
    """

    index: int
    units: tuple[Unit, ...]
    splits: tuple[str | None, ...]
    test_share: float
    join: bool
    directory: Path = Path()
    hash: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the files, as they are packed."""
        return sum(unit.nbytes for unit in self.units)

    def identity(self) -> str:
        """Digest of what the part depends on."""
        units = []
        for unit, split in zip(self.units, self.splits, strict=True):
            stat = unit.path.stat()
            place = [str(unit.path.resolve()), stat.st_size, stat.st_mtime_ns, unit.start]
            units.append([*place, unit.documents, unit.field, split])
        told = json.dumps([self.hash, self.index, units, self.test_share, self.join])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def path(self, split: str, kind: str) -> Path:
        """Of the part: ids (bin) and ends of documents (ends) of a split."""
        return self.directory / f"{self.index}.{split}.{kind}"

    def files(self) -> list[Path]:
        """All files of the part; the last one says that it is whole."""
        made = [self.path(split, kind) for split in SPLITS for kind in ("bin", "ends")]
        return [*made, self.directory / f"{self.index}.json"]


class Part(NamedTuple):
    """What a job adds to a split.

    leading:  tokens of a separator that it begins with
    """

    tokens: int
    documents: int
    characters: int
    leading: int


def write_part(job: Job) -> dict[str, Part]:
    """Write the part of a job, unless it is there: what it adds, by split."""
    marker, identity = job.files()[-1], job.identity()
    if marker.is_file():
        told = json.loads(marker.read_bytes())
        if told.pop("identity") == identity:
            return {split: Part(*numbers) for split, numbers in told.items()}
    tokenizer = _tokenizer(job.directory, job.hash)
    with ExitStack() as stack:
        splits = {
            split: _Split(
                stack.enter_context(whole_file(job.path(split, "bin"))),
                stack.enter_context(whole_file(job.path(split, "ends"))),
                tokenizer,
                job.join,
            )
            for split in SPLITS
        }
        for unit, split, pieces in documents_of(job):
            splits[split].add(pieces, opens=unit.opens, ends=unit.ends)
    parts = {split: each.part() for split, each in splits.items()}
    write_whole(marker, json.dumps({"identity": identity, **parts}))
    return parts


@lru_cache(maxsize=1)
def _tokenizer(directory: Path, hash: str) -> Tokenizer:
    """The tokenizer of a directory, which is read again where it is another than before."""
    return tokenizer_of(directory)


def documents_of(job: Job) -> Iterator[tuple[Unit, str, Iterator[str]]]:
    """The documents of a job: unit, split, and pieces, which must be read before the next one."""
    drawn = _drawn(job)
    for unit, split in zip(job.units, job.splits, strict=True):
        pieces = texts(unit)
        for text, ends in pieces:
            yield unit, split or next(drawn), _document(text, ends, pieces)


def _document(text: str, ends: bool, pieces: Iterator[tuple[str, bool]]) -> Iterator[str]:
    yield text
    while not ends:
        # a document may go on beyond the unit
        text, ends = next(pieces, ("", True))
        yield text


def _drawn(job: Job) -> Iterator[str]:
    """The split of each document: test ones are evenly spaced, from a place that is the job's."""
    key = hashlib.blake2b(str(job.index).encode(), digest_size=8).digest()
    total = int.from_bytes(key, "little") / 2**64
    while True:
        before, total = total, total + job.test_share
        yield SPLITS[math.floor(total) > math.floor(before)]


class _Split:
    """What a part adds to a split."""

    def __init__(self, ids: BinaryIO, ends: BinaryIO, tokenizer: Tokenizer, join: bool):
        self._ids, self._ends, self._tokenizer, self._join = ids, ends, tokenizer, join
        self._dtype = dtype_of(tokenizer.vocabulary)
        self._tokens = self._documents = self._characters = self._leading = 0

    def part(self) -> Part:
        return Part(self._tokens, self._documents, self._characters, self._leading)

    def add(self, pieces: Iterator[str], *, opens: bool, ends: bool) -> None:
        """Write a document, or a part of one that does not open or not end here."""
        begun = not opens
        for ids, characters in self._tokenizer.encode(pieces, goes_on=not ends):
            if not len(ids):
                continue
            if not begun and self._join:
                self._separate()
            begun = True
            self._write(ids, characters)
        if begun and ends:
            if (end := self._tokenizer.end_of_text) is not None:
                self._write(np.array([end]), 0)
            self._documents += 1
            self._ends.write(np.array(self._tokens, ENDS).tobytes())

    def _separate(self) -> None:
        ids = np.array(self._tokenizer.separator, np.int64)
        if not self._tokens:
            self._leading = len(ids)
        self._write(ids, len(self._tokenizer.decode(ids)))

    def _write(self, ids: np.ndarray, characters: int) -> None:
        self._ids.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        self._characters += characters
