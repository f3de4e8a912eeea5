"""Tokenizers of the `tokenizers` library, from their JSON files or trained here."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from dbkernels.settings import check_number

END_OF_TEXT = "<|endoftext|>"  # of those that are trained here
# tokens that end a text in tokenizers that are in use, the first one that a file has
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
LEAST_WORDS = 257  # of one that is trained here: every byte and the end of a text
REPLACEMENT = "\ufffd"  # what stands for bytes that are no character


class Encoded(NamedTuple):
    """Some tokens of a text.

    ids:         (n,) integers
    characters:  that they have: of the text, or of what the tokenizer makes of it
    """

    ids: np.ndarray
    characters: int


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "a tokenizer from a file needs a library: pip install dbkernels[tokenizers]"
        ) from error
    return tokenizers


class TokenizerFile:
    """A tokenizer from a JSON file of the `tokenizers` library.

    No token is added but the end of each text, and what a text says itself is never taken for a
    special token.

    Args:
        name:  of the file
        text:  that it holds
        path:  for messages
    Raises:
        ValueError: the text is no tokenizer, or the library is missing.
    """

    def __init__(self, name: str, text: str, path: Path):
        library = _library()
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library has no narrower one
            raise ValueError(f"{path} is no tokenizer: {error!s:.200}") from error
        self.name, self.text = name, text
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        words = self._tokenizer.get_vocab()
        self.vocabulary = max(words.values(), default=-1) + 1
        self.end_of_text = next((words[end] for end in ENDS if end in words), None)

    @property
    def separator(self) -> tuple[int, ...]:
        # the end of each text separates those that have one
        if self.end_of_text is not None:
            return ()
        return tuple(self._tokenizer.encode("\n", add_special_tokens=False).ids)

    def encode(self, pieces: Iterable[str], *, goes_on: bool = False) -> Iterator[Encoded]:
        for piece in pieces:
            ids = self._tokenizer.encode(piece, add_special_tokens=False).ids
            yield Encoded(np.array(ids, dtype=np.int64), len(piece))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(number) for number in ids])

    def decoder(self) -> "_Text":
        return _Text(self)


class _Text:
    """A text whose words depend on those before, and whose characters may need several tokens."""

    def __init__(self, tokenizer: TokenizerFile):
        self._decode = tokenizer.decode
        # tokens from the last ones that were told on, which the next are decoded with
        self._ids: list[int] = []
        self._told = 0

    def more(self, ids: Sequence[int] | np.ndarray) -> str:
        self._ids += [int(number) for number in ids]
        text = self.rest()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return text

    def rest(self) -> str:
        before = self._decode(self._ids[: self._told])
        return self._decode(self._ids)[len(before) :]


def train_bpe(pieces: Iterable[str], vocabulary: int, name: str) -> TokenizerFile:
    """Train a byte-level BPE, as GPT-2 has it, on texts that come in pieces.

    Args:
        pieces:      of all texts
        vocabulary:  number of ids at most: every byte, the end of a text, and words
        name:        of its file
    Raises:
        ValueError: the vocabulary is too small, or the library is missing.
    """
    check_number("vocabulary", vocabulary, LEAST_WORDS)
    library = _library()
    level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return TokenizerFile(name, tokenizer.to_str(pretty=True), Path(name))
