"""Text to tokens and back: bytes, the 27 symbols of text8, or the JSON file of a tokenizer.

A tokenizer takes a text in pieces too, so that no text has to fit into memory, and gives a text
back while its tokens are still being made.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dbkernels.data.bpe import Encoded, TokenizerFile
from dbkernels.data.token_files import NAME, read_description
from dbkernels.whole_file import write_whole

FILE = "tokenizer.json"  # beside the tokens, and in a run that was trained on them
Ids = Sequence[int] | np.ndarray


class Decoder(Protocol):
    """A text that is told while its tokens come."""

    def more(self, ids: Ids) -> str:
        """What these tokens add to it; characters that lack tokens come with those."""

    def rest(self) -> str:
        """What the last tokens leave: a replacement character where they are part of one."""


class Tokenizer(Protocol):
    """What every tokenizer offers.

    name:         "bytes", "text8" or the name of a file
    text:         its file, whose digest is `hash`
    vocabulary:   number of ids
    end_of_text:  id that ends each document; None where there is none
    separator:    ids between documents that are joined
    """

    name: str
    text: str
    vocabulary: int
    end_of_text: int | None
    separator: tuple[int, ...]

    def encode(self, pieces: Iterable[str], *, goes_on: bool = False) -> Iterator[Encoded]:
        """Tokens of one text that comes in pieces.

        Args:
            pieces:   of the text, in order
            goes_on:  whether more of it follows elsewhere, from where a word begins
        Returns:
            What each piece adds.
        """

    def decode(self, ids: Ids) -> str:
        """The text of some tokens; what is no character is a replacement character."""

    def decoder(self) -> Decoder:
        """A new text that is told while its tokens come."""


def hash_of(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits, by which a tokenizer is told from another of the same name."""
    return hashlib.sha256(tokenizer.text.encode()).hexdigest()[:16]


def encoded(tokenizer: Tokenizer, text: str, *, goes_on: bool = False) -> np.ndarray:
    """All tokens of a text that is in one piece, as `Tokenizer.encode`: (n,) int64."""
    found = tokenizer.encode([text], goes_on=goes_on)
    return np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in found)])


class Bytes:
    """Each byte of a text in UTF-8 is a token."""

    name, text, vocabulary = "bytes", '{"type": "bytes"}\n', 256
    end_of_text, separator = None, (ord("\n"),)

    def encode(self, pieces: Iterable[str], *, goes_on: bool = False) -> Iterator[Encoded]:
        for piece in pieces:
            yield Encoded(np.frombuffer(piece.encode(), np.uint8), len(piece))

    def decode(self, ids: Ids) -> str:
        return _bytes(ids).decode(errors="replace")

    def decoder(self) -> Decoder:
        return _Utf8()


class _Utf8:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def more(self, ids: Ids) -> str:
        return self._decoder.decode(_bytes(ids))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


def _bytes(ids: Ids) -> bytes:
    return np.asarray(ids, dtype=np.uint8).tobytes()


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPELLED = {str(digit).encode(): f" {word} ".encode() for digit, word in enumerate(DIGITS)}
LETTERS = b"abcdefghijklmnopqrstuvwxyz"
# letters lower, digits as they are, anything else a space
PLAIN = bytes(
    ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else 32 for byte in range(256)
)
TO_IDS = bytes(byte - 96 if byte in LETTERS else 0 for byte in range(256))
TO_TEXT = b" " + LETTERS


class Text8:
    """The letters a to z and single spaces: 27 symbols, the space 0 and a to z 1 to 26.

    Text is made such as Mahoney's text8 is (mattmahoney.net/dc/textdata.html): capital letters of
    ASCII become small, digits are spelled out one by one, and whatever else stands between words is
    one space. A text begins and ends with a word.
    """

    name, text, vocabulary = "text8", '{"type": "text8"}\n', 27
    end_of_text, separator = None, (0,)

    def encode(self, pieces: Iterable[str], *, goes_on: bool = False) -> Iterator[Encoded]:
        begun = between = False  # whether there was a word, and a space behind it
        for piece in pieces:
            plain = piece.encode().translate(PLAIN)
            for digit, word in SPELLED.items():
                plain = plain.replace(digit, word)
            words = b" ".join(plain.split())
            if words and begun and (between or plain[0] == 32):
                words = b" " + words
            between = plain[-1] == 32 if words else between or bool(plain)
            begun = begun or bool(words)
            yield Encoded(np.frombuffer(words.translate(TO_IDS), np.uint8), len(words))
        if goes_on and begun:
            yield Encoded(np.zeros(1, np.uint8), 1)

    def decode(self, ids: Ids) -> str:
        return "".join(chr(TO_TEXT[number]) for number in ids)

    def decoder(self) -> Decoder:
        return _Symbols(self)


class _Symbols:
    def __init__(self, tokenizer: Text8):
        self.more = tokenizer.decode

    def rest(self) -> str:
        return ""


BUILT_IN = {"bytes": Bytes, "text8": Text8}


def open_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer by its name, or from its file.

    Args:
        source:  "bytes", "text8", or the path of a JSON file of the `tokenizers` library
    Raises:
        ValueError: there is no such file, it is no tokenizer, or the library is missing.
    """
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]()
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"tokenizer must be bytes, text8 or the path of a JSON file, got {source}")
    return _from_file(path, path.name)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Keep a tokenizer beside tokens, or in a run, where `tokenizer_of` finds it."""
    write_whole(Path(directory) / FILE, tokenizer.text)


def tokenizer_of(directory: str | Path) -> Tokenizer:
    """The tokenizer of a directory of tokens, or of a run that keeps one.

    Raises:
        ValueError: the directory has none, or another than that which made its tokens.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer: expected {FILE} in it")
    found = _from_file(path, FILE)
    if (path.parent / NAME).is_file():
        told = read_description(path.parent)
        if (got := hash_of(found)) != told.hash:
            raise ValueError(
                f"{path} must be the tokenizer that made the tokens beside it, {told.tokenizer} "
                f"{told.hash}, got {got}"
            )
    return found


def _from_file(path: Path, name: str) -> Tokenizer:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    for built_in in BUILT_IN.values():
        if text == built_in.text:
            return built_in()
    return TokenizerFile(name, text, path)
