"""Text files of any size in units that several processes read, each in pieces that fit in memory.

A file ends in .txt, or in any other way; in .jsonl, where each line is an object with a text; or in
.gz behind either.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

Documents = Literal["file", "line", "blank"]
FOUND = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")  # what is read of a folder
UNIT = 2**24  # bytes of a unit, of a file that can be cut
PIECE = 2**20  # bytes that are read at a time
TAIL = 2**12  # last bytes of a piece, in which it is cut where a line begins
# where a file may be cut between two processes: where a document ends or, in one that goes on,
# between a line and one that begins with a word, where most tokenizers see no further back
LINE = re.compile(rb"[^\s]\n(?=[A-Za-z0-9])")
CUTS = {"file": LINE, "line": re.compile(rb"\n"), "blank": re.compile(rb"\n[ \t\r]*\n")}
# where what one process reads is cut, from best to worst
PIECE_CUTS = LINE, CUTS["line"], re.compile(rb"[^\s](?= [^\s])")


@dataclass(frozen=True)
class Unit:
    """A part of a file that one process reads.

    Args:
        path:       of the file
        start:      first byte
        stop:       byte behind the last; None is the end of a file that is packed
        documents:  what a document is
        field:      name of the text in an object of .jsonl
        opens:      whether a document begins where the unit does
        ends:       whether a document ends where the unit does
    """

    path: Path
    start: int
    stop: int | None
    documents: Documents
    field: str
    opens: bool
    ends: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the file, as they are packed."""
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of folders, in the order of their names.

    Raises:
        ValueError: there is no such file or folder, or it has no text.
    """
    found = []
    for path in inputs:
        inside = [path]
        if path.is_dir():
            every = sorted(path.rglob("*"))
            inside = [each for each in every if _is_text(each.relative_to(path)) and each.is_file()]
            inside = [each for each in inside if each.stat().st_size]
            if not inside:
                raise ValueError(f"{path} has no text: expected {', '.join(FOUND)} files in it")
        elif not path.is_file():
            raise ValueError(f"file {path} is missing")
        elif not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        found += inside
    return found


def _is_text(path: Path) -> bool:
    return path.name.endswith(FOUND) and not any(part.startswith(".") for part in path.parts)


def _has_objects(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def units_of(path: Path, documents: Documents, field: str) -> Iterator[Unit]:
    """A file cut where no document is, or else where the next word does not depend on the cut."""
    if _has_objects(path):
        documents = "line"
    whole = documents == "file"
    if path.suffix == ".gz":
        yield Unit(path, 0, None, documents, field, opens=True, ends=True)
        return
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            stop = _cut(file, start + UNIT, CUTS[documents]) or size
            opens, ends = not whole or not start, not whole or stop == size
            yield Unit(path, start, stop, documents, field, opens=opens, ends=ends)
            start = stop


def _cut(file: BinaryIO, start: int, pattern: re.Pattern[bytes]) -> int | None:
    """The first place from a byte on where a file may be cut; None where there is none."""
    file.seek(start)
    kept = b""
    while block := file.read(PIECE):
        if found := pattern.search(kept + block):
            return file.tell() - len(block) - len(kept) + found.end()
        kept = (kept + block)[-TAIL:]
    return None


def texts(unit: Unit) -> Iterator[tuple[str, bool]]:
    """The text of a unit in pieces, each with whether a document ends behind it.

    A piece may be empty. The last one ends a document where the unit does.

    Raises:
        ValueError: a file cannot be read, or is no UTF-8, with the place; or a line is no object
            with a text.
    """
    pieces = _decoded(unit)
    if _has_objects(unit.path):
        return _of_objects(_lines(pieces), unit)
    if unit.documents == "file":
        return _whole(pieces, unit.ends)
    return _lines(pieces) if unit.documents == "line" else _paragraphs(pieces)


def _decoded(unit: Unit) -> Iterator[str]:
    decoder, place = codecs.getincrementaldecoder("utf-8")(), unit.start
    for block, last in _blocks(unit):
        first = place - len(decoder.getstate()[0])
        place += len(block)
        try:
            text = decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            packed = " of what it holds" if unit.stop is None else ""
            raise ValueError(
                f"{unit.path} must be UTF-8, got {error.reason} at byte {first + error.start}"
                f"{packed}"
            ) from error
        # a mark of the order of bytes is no text
        yield text.removeprefix("\ufeff") if place == len(block) else text


def _blocks(unit: Unit) -> Iterator[tuple[bytes, bool]]:
    """Bytes of a unit, cut between words where it can be, each with whether it is the last."""
    kept, left = b"", float("inf") if unit.stop is None else unit.stop - unit.start
    with gzip.open(unit.path) if unit.stop is None else unit.path.open("rb") as file:
        file.seek(unit.start)
        while left:
            try:
                block = file.read(PIECE if left > PIECE else int(left))
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{unit.path} cannot be read: {error}") from error
            if not block and unit.stop is not None:
                raise ValueError(f"{unit.path} was cut short while it was in use")
            left = left - len(block) if block else 0
            block = kept + block
            stop = _last_cut(block) if left else len(block)
            yield block[:stop], not left
            kept = block[stop:]


def _last_cut(block: bytes) -> int:
    first = max(0, len(block) - TAIL)
    for pattern in PIECE_CUTS:
        if found := [match.end() for match in pattern.finditer(block, first)]:
            return found[-1]
    # what ends a line stays together
    return len(block) - block.endswith(b"\r")


def _whole(pieces: Iterator[str], ends: bool) -> Iterator[tuple[str, bool]]:
    for piece in pieces:
        yield piece, False
    yield "", ends


def _lines(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    for piece in pieces:
        *lines, begun = piece.split("\n")
        for line in lines:
            yield line.removesuffix("\r"), True
        if begun:
            yield begun, False
    yield "", True


def _paragraphs(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Lines up to one that is empty or blank; the end of the last one is not the paragraph's."""
    between, blank = "", True  # what comes before the next word of a line, and whether there is one
    for text, line_ends in _lines(pieces):
        if text.strip() or not blank:
            yield between + text, False
            between, blank = "", False
        else:
            between += text
        if line_ends:
            if blank:
                yield "", True
            between, blank = "" if blank else "\n", True
    yield "", True


def _of_objects(lines: Iterator[tuple[str, bool]], unit: Unit) -> Iterator[tuple[str, bool]]:
    line = ""
    for text, ends in lines:
        line += text
        if not ends:
            continue
        if line.strip():
            yield _text_of(line, unit), True
        line = ""


def _text_of(line: str, unit: Unit) -> str:
    try:
        text = json.loads(line)[unit.field]
        text.encode()
    # no JSON, or no object, or one that lacks the field, or a field that is no text of UTF-8
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"each line of {unit.path} must be an object with a text {unit.field!r}, got {line:.60}"
        ) from error
    return text
