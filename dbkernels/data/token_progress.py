"""A directory of tokens while it is made: parts are appended, and what was appended is known."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dbkernels.data.token_files import (
    ENDS,
    SPLITS,
    Counts,
    Description,
    dtype_of,
    write_description,
)
from dbkernels.data.token_parts import Job, Part
from dbkernels.data.tokenizer import FILE, Tokenizer, hash_of
from dbkernels.whole_file import make_directory, write_whole

PROGRESS = "progress.json"
TRAINED = "trained.txt"  # digest of what the tokenizer beside it was trained on
OWN = PROGRESS, TRAINED  # what a directory has until it takes its name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a directory where it is missing, and have it for this process alone.

    Raises:
        ValueError: another process has it.
    """
    make_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process is at work in {directory}") from error
    finally:
        os.close(descriptor)


class Progress:
    """How far a directory is, which is on the disk after each part.

    Args:
        directory:  that exists
        tokenizer:  of all its tokens
        join:       whether its documents are joined
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, join: bool):
        self.directory, self._tokenizer, self._join = directory, tokenizer, join
        self.done, self._jobs = 0, ""  # how many jobs, and a digest of them
        self._splits = {split: Counts(0, 0, 0) for split in SPLITS}

    def go_on(self, jobs: Sequence[Job]) -> None:
        """Find what was done before.

        Raises:
            ValueError: it was not of these jobs.
        """
        path = self.directory / PROGRESS
        if not path.exists():
            return
        told = json.loads(path.read_bytes())
        digest = ""
        for job in jobs[: told["done"]]:
            digest = _chained(digest, job)
        if len(jobs) < told["done"] or digest != told["jobs"]:
            raise ValueError(
                f"{self.directory} has the beginning of other text or settings: delete it, or "
                "give another out"
            )
        self.done, self._jobs = told["done"], digest
        self._splits = {split: Counts(*numbers) for split, numbers in told["splits"].items()}

    @property
    def _dtype(self) -> np.dtype:
        return dtype_of(self._tokenizer.vocabulary)

    def append(self, job: Job, parts: dict[str, Part]) -> None:
        """Add what a job made to the splits, and delete it."""
        for split, part in parts.items():
            self._splits[split] = self._appended(job, split, part)
        self.done, self._jobs = self.done + 1, _chained(self._jobs, job)
        splits = {split: astuple(counts) for split, counts in self._splits.items()}
        told = {"done": self.done, "jobs": self._jobs, "splits": splits}
        write_whole(self.directory / PROGRESS, json.dumps(told))
        for path in job.files():
            path.unlink(missing_ok=True)

    def _appended(self, job: Job, split: str, part: Part) -> Counts:
        before = self._splits[split]
        # what separates documents does not come before the first one
        leading = 0 if before.tokens else part.leading
        start = before.tokens - leading
        place = before.tokens * self._dtype.itemsize
        with job.path(split, "bin").open("rb") as made, self._from(f"{split}.bin", place) as file:
            made.seek(leading * self._dtype.itemsize)
            shutil.copyfileobj(made, file)
        with self._from(f"{split}.ends", before.documents * ENDS.itemsize) as file:
            if not self._join:
                file.write((np.fromfile(job.path(split, "ends"), ENDS) + start).tobytes())
        documents = 0 if self._join else before.documents + part.documents
        characters = before.characters + part.characters
        if leading:
            characters -= len(self._tokenizer.decode(self._tokenizer.separator))
        return Counts(start + part.tokens, documents, characters)

    @contextmanager
    def _from(self, name: str, place: int) -> Iterator[BinaryIO]:
        """A file to go on with from a place, behind which it has nothing that counts."""
        path = self.directory / name
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(place)
            file.seek(place)
            yield file
            file.flush()
            os.fsync(file.fileno())

    def finish(self, wanted: Collection[str]) -> Description:
        """Make it a directory that `open_tokens` reads.

        Args:
            wanted:  splits
        Raises:
            ValueError: one of them has no text.
        """
        for split in wanted:
            if not self._splits[split].tokens:
                # to go on from here would come here again
                (self.directory / PROGRESS).unlink()
                raise ValueError(f"the {split} split has no text")
        names = [f"{split}.{kind}" for split in wanted for kind in ("bin", "ends")]
        for path in self.directory.iterdir():
            # what a process that was killed has left, and a split that nobody asked for
            if path.name not in (*names, FILE, *OWN):
                path.unlink()
        splits = {split: self._splits[split] for split in SPLITS if split in wanted}
        if self._join:
            for split, counts in splits.items():
                with self._from(f"{split}.ends", 0) as file:
                    file.write(np.array([counts.tokens], ENDS).tobytes())
                splits[split] = replace(counts, documents=1)
        made = self._tokenizer
        described = Description(made.name, hash_of(made), made.vocabulary, made.end_of_text, splits)
        write_description(self.directory, described)
        return described


def _chained(digest: str, job: Job) -> str:
    return hashlib.sha256((digest + job.identity()).encode()).hexdigest()[:16]
