"""CIFAR-10 and CIFAR-100 as their archives hold them: the binary ones are read where they lie."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dbkernels.data.cifar_pickle import SHAPE, read_pickled
from dbkernels.data.formats import Arrays, MissingSplit, OneByOne
from dbkernels.data.rows import RowsOnDisk


class CifarLayout(NamedTuple):
    """Records of label bytes, the last of which counts, and 3 x 32 x 32 pixels; or pickles."""

    folder: str  # as the archive names it
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    num_classes: int
    labels: str = ""  # their name in a pickle


CIFAR_10_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_10_BIN = tuple(f"{name}.bin" for name in CIFAR_10_BATCHES)
CIFAR = (
    CifarLayout("cifar-10-batches-bin", CIFAR_10_BIN, ("test_batch.bin",), 1, 10),
    CifarLayout("cifar-100-binary", ("train.bin",), ("test.bin",), 2, 100),
    CifarLayout("cifar-10-batches-py", CIFAR_10_BATCHES, ("test_batch",), 0, 10, "labels"),
    CifarLayout("cifar-100-python", ("train",), ("test",), 0, 100, "fine_labels"),
)


def find_cifar(root: Path) -> tuple[Path, CifarLayout] | None:
    """The folder, this one or the archive's inside it, that has any of CIFAR's files."""
    for layout in CIFAR:
        for folder in (root, root / layout.folder):
            if any((folder / name).is_file() for name in layout.train + layout.test):
                return folder, layout
    return None


def read_cifar(folder: Path, layout: CifarLayout, split: str) -> Arrays:
    """CIFAR-10, or CIFAR-100 with its fine labels."""
    names = layout.train if split == "train" else layout.test
    if not any((folder / name).is_file() for name in names):
        raise MissingSplit(f"{folder} has no {split} split: expected {', '.join(names)} in it")
    if layout.labels:
        told = layout.labels, layout.num_classes
        pixels, own = zip(*(read_pickled(folder / name, *told) for name in names), strict=True)
        return Arrays(np.concatenate(pixels), np.concatenate(own), layout.num_classes)
    images, labels = zip(*(_open(folder / name, layout) for name in names), strict=True)
    # where each lies: no pixel is read before its row is asked for
    places = [(rows, index) for rows in images for index in range(len(rows))]
    read = OneByOne(places, SHAPE, lambda place: place[0][[place[1]]][0])
    numbers = np.concatenate([rows[range(len(rows))] for rows in labels])
    return Arrays(read, numbers.astype(np.int64), layout.num_classes)


def _open(path: Path, layout: CifarLayout) -> tuple[RowsOnDisk, RowsOnDisk]:
    """Images and labels of a file's records."""
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    size, record_bytes = path.stat().st_size, layout.label_bytes + math.prod(SHAPE)
    if size == 0 or size % record_bytes:
        raise ValueError(
            f"{path} is truncated: expected a multiple of {record_bytes} bytes, got {size}"
        )
    count = size // record_bytes
    records = partial(RowsOnDisk, path, dtype=np.uint8, step_bytes=record_bytes)
    return (
        records(shape=(count, *SHAPE), offset=layout.label_bytes),
        records(shape=(count,), offset=layout.label_bytes - 1),
    )
