"""A directory of tokens: what `tokenize` writes and `open_tokens` reads.

    tokens.json    the tokenizer, its vocabulary, and the counts of each split
    train.bin      ids of all documents, one after another: uint16 or uint32, little endian
    train.ends     where each document ends, in tokens from the first on: int64, little endian
    test.bin, test.ends    likewise, of the documents that are held out, where there are any

tokens.json is written last: a directory that has it is whole.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dbkernels.settings import check_choice, check_number
from dbkernels.whole_file import make_directory, whole_file, write_whole

VERSION = 1  # of the directory
NAME = "tokens.json"
SPLITS = ("train", "test")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS = np.dtype("<i8")
MOST_WORDS = 2**31 - 1  # of a vocabulary: the mask token, which comes after it, needs an id too


@dataclass(frozen=True)
class Counts:
    """Of one split.

    characters:  of its text, or of what the tokenizer makes of it; as many as tokens where nobody
                 says it
    """

    tokens: int
    documents: int
    characters: int


@dataclass(frozen=True)
class Description:
    """What tokens.json says.

    Args:
        tokenizer:    bytes, text8, or the name that the file of another has
        hash:         of the tokenizer, by which another of the same name is told from it
        vocabulary:   number of ids
        end_of_text:  id that ends each document; None where the tokenizer has none
        splits:       "train", and "test" where there is one
    Raises:
        ValueError: the vocabulary is too small or too large, or has no end_of_text in it.
    """

    tokenizer: str
    hash: str
    vocabulary: int
    end_of_text: int | None
    splits: dict[str, Counts]

    def __post_init__(self) -> None:
        check_number("vocabulary", self.vocabulary, 1, MOST_WORDS)
        if self.end_of_text is not None:
            check_number("end_of_text", self.end_of_text, 0, self.vocabulary - 1)

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in its files."""
        return dtype_of(self.vocabulary)


def dtype_of(vocabulary: int) -> np.dtype:
    """The narrowest dtype that has every id."""
    return DTYPES["uint16" if vocabulary <= 2**16 else "uint32"]


def write_description(directory: Path, description: Description) -> None:
    """Finish a directory whose other files are on the disk."""
    # for other readers of the files
    told = {"version": VERSION, **asdict(description), "dtype": str(description.dtype)}
    write_whole(directory / NAME, json.dumps(told, indent=2) + "\n")


def read_description(directory: Path) -> Description:
    """What a directory's tokens.json says.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    path = directory / NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {NAME}: expected a directory that "
            "`python -m dbkernels tokenize` has finished"
        )
    try:
        told = dict(json.loads(path.read_bytes()))
        version = told.pop("version")
        if version != VERSION:
            raise ValueError(f"expected version {VERSION}, got {version!r:.50}")
        dtype, splits = told.pop("dtype"), dict(told.pop("splits"))
        _require_names("splits", splits, {"train"}, set(SPLITS))
        counts = {name: _counts(split) for name, split in splits.items()}
        for name, kind in (("tokenizer", str), ("hash", str), ("vocabulary", int)):
            if type(told[name]) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {told[name]!r:.50}")
        if told["end_of_text"] is not None:
            _whole_numbers({"end_of_text": told["end_of_text"]})
        found = Description(**told, splits=counts)
        check_choice("dtype", dtype, [str(found.dtype)])
    # a name that is missing, or one too many, or a list where an object should be
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no description of tokens: {error!s:.200}") from error
    return found


def _counts(split: Mapping[str, object]) -> Counts:
    numbers = _whole_numbers(split)
    return Counts(**{"characters": numbers["tokens"]} | numbers)


def _require_names(what: str, got: Mapping, least: set[str], most: set[str]) -> None:
    if not least <= set(got) <= most:
        raise ValueError(f"{what} must be {', '.join(sorted(most, reverse=True))}, got {list(got)}")


def _whole_numbers(numbers: Mapping[str, object]) -> dict[str, int]:
    for name, number in dict(numbers).items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{name} must be a whole number, got {number!r:.50}")
    return dict(numbers)


def write_tokens(
    directory: str | Path,
    splits: Mapping[str, Iterable[Sequence[int] | np.ndarray]],
    *,
    vocabulary: int,
    tokenizer: str = "own",
    hash: str = "",
    end_of_text: int | None = None,
    characters: Mapping[str, int] | None = None,
) -> None:
    """Write tokens of your own as a directory that `open_tokens` reads.

    Args:
        directory:    to write; it is made where it is missing, and has no tokens yet
        splits:       documents of "train", and of "test" if some are held out: ids of each, which
                      are read one document at a time; empty documents are left out
        vocabulary:   number of ids
        tokenizer:    as `Description` has it
        hash:         likewise
        end_of_text:  likewise
        characters:   of the text of each split; None is one of each token
    Raises:
        ValueError: an id is not in [0, vocabulary), the splits have other names, or the directory
                    has tokens already.
    """
    directory = Path(directory)
    _require_names("splits", splits, {"train"}, set(SPLITS))
    empty = Description(tokenizer, hash, vocabulary, end_of_text, {})
    if characters is not None and set(characters) != set(splits):
        raise ValueError(f"characters must be of {[*splits]}, got {[*characters]}")
    if (directory / NAME).exists():
        raise ValueError(f"directory must have no tokens yet, got {directory / NAME}")
    make_directory(directory)
    counts = {
        name: _write_split(directory / name, documents, empty) for name, documents in splits.items()
    }
    if characters is not None:
        counts = {name: replace(each, characters=characters[name]) for name, each in counts.items()}
    write_description(directory, Description(tokenizer, hash, vocabulary, end_of_text, counts))


def _write_split(
    stem: Path, documents: Iterable[Sequence[int] | np.ndarray], description: Description
) -> Counts:
    tokens = count = 0
    with whole_file(stem.with_suffix(".bin")) as ids, whole_file(stem.with_suffix(".ends")) as ends:
        for index, document in enumerate(documents):
            wide = np.asarray(document)
            if not len(wide):
                continue
            check_ids(wide, description.vocabulary, f"document {index} of {stem.name}")
            ids.write(wide.astype(description.dtype).data)
            tokens, count = tokens + len(wide), count + 1
            ends.write(np.array(tokens, ENDS).tobytes())
    return Counts(tokens, count, characters=tokens)


def check_ids(ids: np.ndarray, vocabulary: int, where: str, *, first: int = 0) -> None:
    """Refuse ids that the vocabulary does not have.

    Args:
        ids:    (N,) integers
        where:  they are, for the message
        first:  the number that the first of them has there
    Raises:
        ValueError: with the place and the value of the first id that is too large or negative.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{where} must be (N,) integers, got {ids.shape} {ids.dtype}")
    if ids.max(initial=0) < vocabulary and ids.min(initial=0) >= 0:
        return
    place = int(np.argmax((ids >= vocabulary) | (ids < 0)))
    wrong = int(ids[place])
    mask = ", which is the mask token and no data" if wrong == vocabulary else ""
    raise ValueError(
        f"{where} has id {wrong} at token {first + place}{mask}: expected ids in [0, {vocabulary})"
    )
