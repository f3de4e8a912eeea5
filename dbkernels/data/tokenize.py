"""Text files to a directory of tokens, in several processes, and on from where it was stopped.

Files are cut into units, and jobs have some units each. A process writes the tokens of a job as a
part; this one appends the parts in their order. What it has appended is written down after each, so
that a tokenization that was stopped goes on behind it, with what parts there are.

It all happens in a directory beside that which is asked for, which takes its name at the end.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import get_args

from dbkernels.data.bpe import LEAST_WORDS, TokenizerFile, train_bpe
from dbkernels.data.text_files import UNIT, Documents, Unit, find_files, units_of
from dbkernels.data.token_files import MOST_WORDS, Description
from dbkernels.data.token_parts import Job, documents_of, write_part
from dbkernels.data.token_progress import OWN, PROGRESS, TRAINED, Progress, locked
from dbkernels.data.tokenizer import FILE, Tokenizer, hash_of, open_tokenizer, save_tokenizer
from dbkernels.pool import results
from dbkernels.settings import check_choice, check_number
from dbkernels.whole_file import make_durable, write_whole

UNFINISHED = ".unfinished"  # behind the name of the directory that is asked for
BPE = "bpe"  # name of a tokenizer that is trained here
AHEAD = 4  # parts, of each process, that may wait for one before them
MOST_PROCESSES = 2**10
Told = Callable[[int, int], None]  # how many bytes of text are done, and of how many


@dataclass(frozen=True)
class TokenizeConfig:
    """What becomes of which text."""

    inputs: tuple[Path, ...]
    """Text files, .jsonl files of objects with a text, either packed as .gz, and folders of them,
    of which .txt, .jsonl, .txt.gz and .jsonl.gz are read."""
    out: Path
    """Directory to write; it must not exist yet, or be empty."""
    tokenizer: str = ""
    """bytes, text8 (27 symbols), or the path of a JSON file of the tokenizers library."""
    train_bpe: int = 0
    """Train a byte-level BPE of so many words on the text instead, 257 at least; 0 trains none."""
    test: tuple[Path, ...] = ()
    """Files and folders that are held out to test on."""
    test_share: float = 0.0
    """Share of the documents that are held out to test on, evenly spaced, where no files are."""
    documents: Documents = "file"
    """What a document is: a file, a line, or what stands between blank lines; of a .jsonl file it
    is a line in any case."""
    join: bool = False
    """Join the documents, so that windows reach from one into the next; else none does."""
    field: str = "text"
    """Name of the text in the objects of .jsonl files."""
    processes: int = 0
    """Processes that work at a time; 0 is one for each processor."""

    def __post_init__(self) -> None:
        if bool(self.tokenizer) == bool(self.train_bpe):
            raise ValueError(
                "one of tokenizer and train_bpe must be given, "
                f"got {self.tokenizer or 'none'} and {self.train_bpe}"
            )
        if self.train_bpe:
            check_number("train_bpe", self.train_bpe, LEAST_WORDS, MOST_WORDS)
        check_choice("documents", self.documents, get_args(Documents))
        check_number("processes", self.processes, 0, MOST_PROCESSES)
        if not 0 <= self.test_share < 1:
            raise ValueError(f"test_share must be in [0, 1), got {self.test_share}")
        if self.test and self.test_share:
            raise ValueError(f"test_share must be 0 where test names files, got {self.test_share}")
        if not self.inputs:
            raise ValueError("inputs must name at least one file or folder, got none")


def tokenize(config: TokenizeConfig, told: Told = lambda done, total: None) -> Description:
    """Write the directory of tokens of some text, for `open_tokens` to read.

    One that was stopped goes on: with the same configuration, as far as the same files are done.
    After a mistake in the text nothing is left where nothing was done before it.

    Args:
        config:  what becomes of which text
        told:    is called with the bytes of text that are done, and with all there are
    Raises:
        ValueError: the configuration, a file or its text cannot be used, with the place; a split
            has no text; or another tokenization was stopped there, or is at work.
    """
    given = open_tokenizer(config.tokenizer) if config.tokenizer else None
    out = config.out.absolute()
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must not exist yet, or be an empty directory, got {config.out}")
    work = out.with_name(out.name + UNFINISHED)
    planned = [replace(job, directory=work) for job in _planned(config)]
    with locked(work), _left_only_where_it_serves(work):
        tokenizer = given or _trained(config.train_bpe, planned, work)
        save_tokenizer(tokenizer, work)
        jobs = [replace(job, hash=hash_of(tokenizer)) for job in planned]
        progress = Progress(work, tokenizer, join=config.join)
        progress.go_on(jobs)
        _append_all(jobs, progress, config.processes or os.cpu_count() or 1, told)
        tests = config.test or config.test_share
        described = progress.finish(("train", "test") if tests else ("train",))
        os.rename(work, out)
    for name in OWN:
        (out / name).unlink(missing_ok=True)
    make_durable(out.parent)
    return described


@contextmanager
def _left_only_where_it_serves(work: Path) -> Iterator[None]:
    """Delete a directory after a mistake, unless a part was appended to go on behind."""
    try:
        yield
    except ValueError:
        if not (work / PROGRESS).exists():
            shutil.rmtree(work)
        raise


def _append_all(jobs: Sequence[Job], progress: Progress, processes: int, told: Told) -> None:
    sizes = [job.nbytes for job in jobs]
    done, total = sum(sizes[: progress.done]), sum(sizes)
    left = jobs[progress.done :]
    made = results(
        [partial(write_part, job) for job in left], most=processes, ahead=AHEAD * processes
    )
    try:
        for job, parts in zip(left, made, strict=True):
            progress.append(job, parts)
            done += sizes[job.index]
            told(done, total)
    except BrokenProcessPool as error:
        raise MemoryError(
            "a process was killed, perhaps for want of memory: run it again, which goes on, with "
            "fewer processes"
        ) from error


def _trained(words: int, jobs: Sequence[Job], work: Path) -> Tokenizer:
    """A BPE of the text that is not held out; the one that is there where it is of the same."""
    told = " ".join([str(words), *(job.identity() for job in jobs)])
    digest = hashlib.sha256(told.encode()).hexdigest()
    mark, file = work / TRAINED, work / FILE
    if mark.is_file() and mark.read_text() == digest:
        return TokenizerFile(BPE, file.read_text(), file)
    pieces = (
        piece
        for job in jobs
        for _, split, document in documents_of(job)
        for piece in document
        if split == "train"
    )
    tokenizer = train_bpe(pieces, words, BPE)
    save_tokenizer(tokenizer, work)
    write_whole(mark, digest)
    return tokenizer


def _planned(config: TokenizeConfig) -> Iterator[Job]:
    """Units in jobs of about as many bytes as one has at most."""
    some: list[tuple[Unit, str | None]] = []
    index = size = 0
    for unit, split in chain(_train(config), _test(config)):
        if some and size + unit.nbytes > UNIT:
            yield _job(index, some, config)
            index, size, some = index + 1, 0, []
        some.append((unit, split))
        size += unit.nbytes
    yield _job(index, some, config)


def _job(index: int, some: list[tuple[Unit, str | None]], config: TokenizeConfig) -> Job:
    units, splits = zip(*some, strict=True)
    return Job(index, units, splits, config.test_share, config.join)


def _train(config: TokenizeConfig) -> Iterator[tuple[Unit, str | None]]:
    """Units with their splits; None where documents of one are to be drawn."""
    files = find_files(config.inputs)
    for index, path in enumerate(files):
        before, after = (math.floor(number * config.test_share) for number in (index, index + 1))
        for unit in units_of(path, config.documents, config.field):
            if unit.documents == "file" or not config.test_share:
                yield unit, "test" if after > before else "train"
            else:
                yield unit, None


def _test(config: TokenizeConfig) -> Iterator[tuple[Unit, str | None]]:
    for path in find_files(config.test):
        for unit in units_of(path, config.documents, config.field):
            yield unit, "test"
