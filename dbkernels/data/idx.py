"""Images in IDX files, as MNIST and those that look like it come: grey, with labels of a byte.

The format: two zeros, the type of the numbers, the number of dimensions, then the size of each as
four bytes, the most significant first, and then the numbers (yann.lecun.com/exdb/mnist).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dbkernels.data.formats import MAX_COMPRESSED_BYTES, Arrays, MissingSplit
from dbkernels.data.rows import RowsOnDisk

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts its files
FASHION_PACKAGE = "dataset-fashion-mnist"
STEMS = {"train": ("train",), "test": ("t10k", "test")}
KINDS = {"images": 3, "labels": 1}  # and their dimensions
BYTES = 0x08  # the type of numbers


def fashion() -> Path:
    """The folder of Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), as Debian installs it.

    Raises:
        ValueError: it is not installed, with the command that installs it.
    """
    if not FASHION.is_dir():
        raise ValueError(
            f"fashion needs the files of {FASHION}: sudo apt install {FASHION_PACKAGE}, or give "
            "the path of a folder that has them"
        )
    return FASHION


def has_idx(folder: Path) -> bool:
    """Whether a folder has images of either split in IDX files."""
    return any(_find(folder, split, "images") for split in STEMS)


def _find(folder: Path, split: str, kind: str) -> Path | None:
    names = [
        f"{stem}-{kind}{dot}idx{KINDS[kind]}-ubyte{packed}"
        for stem in STEMS[split]
        for dot in "-."
        for packed in ("", ".gz")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(folder: Path, split: str) -> Arrays:
    """One split of a folder of IDX files: images of bytes (N, H, W) and labels (N,)."""
    images = _find(folder, split, "images")
    if images is None:
        raise MissingSplit(
            f"{folder} has no {split} split: expected {STEMS[split][0]}-images-idx3-ubyte or .gz"
        )
    every = {name: _find(folder, name, "labels") for name in STEMS}
    if every[split] is None:
        raise ValueError(f"{folder} has {images.name}, and no labels of that split beside it")
    labels = {name: _open(path, "labels") for name, path in every.items() if path}
    numbers = {name: np.asarray(rows[range(len(rows))]) for name, rows in labels.items()}
    # both splits count: one that lacks the last class must not make a smaller model
    count = 1 + max((int(each.max()) for each in numbers.values() if len(each)), default=0)
    return Arrays(_open(images, "images"), numbers[split].astype(np.int64), count)


def _open(path: Path, kind: str) -> RowsOnDisk | np.ndarray:
    """The numbers where they lie, or in memory where they are packed; images get a channel."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            shape = _read_header(file, KINDS[kind])
            start, expected = file.tell(), math.prod(shape)
            if packed and expected > MAX_COMPRESSED_BYTES:
                raise ValueError(f"{expected} bytes are packed: unpack it, to be read from disk")
            numbers = file.read(expected + 1) if packed else b""
        size = len(numbers) if packed else path.stat().st_size - start
        if size != expected:
            more = "more" if size > expected else size
            raise ValueError(f"expected {expected} bytes of {shape}, got {more}")
    except (ValueError, EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is no whole IDX file of bytes: {error}") from error
    shape = (shape[0], 1, *shape[1:]) if kind == "images" else shape
    if packed:
        return np.frombuffer(numbers, np.uint8).reshape(shape)
    return RowsOnDisk(path, shape, np.dtype(np.uint8), offset=start)


def _read_header(file: BinaryIO, dimensions: int) -> tuple[int, ...]:
    zeros, kind, count = struct.unpack(">HBB", file.read(4))
    if (zeros, kind, count) != (0, BYTES, dimensions):
        raise ValueError(f"expected {dimensions} dimensions of bytes, got {zeros, kind, count}")
    return struct.unpack(f">{count}I", file.read(4 * count))
