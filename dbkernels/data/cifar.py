"""CIFAR-10 and CIFAR-100 as their binary archives hold them, mapped where they lie."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dbkernels.data.formats import Arrays, OneByOne


class CifarLayout(NamedTuple):
    """Records of label bytes, the last of which counts, and 3 x 32 x 32 pixels."""

    folder: str  # as the archive names it
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    num_classes: int


CIFAR_10_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR = (
    CifarLayout("cifar-10-batches-bin", CIFAR_10_BATCHES, ("test_batch.bin",), 1, 10),
    CifarLayout("cifar-100-binary", ("train.bin",), ("test.bin",), 2, 100),
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
    files = [_map_records(folder / name, layout) for name in names]
    # a view of each: no pixel is read before its row is asked for
    records, shape = list(chain.from_iterable(files)), (3, 32, 32)
    images = OneByOne(records, shape, lambda record: record[layout.label_bytes :].reshape(shape))
    labels = np.concatenate([file[:, layout.label_bytes - 1] for file in files])
    return Arrays(images, labels.astype(np.int64), layout.num_classes)


def _map_records(path: Path, layout: CifarLayout) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    size, record_bytes = path.stat().st_size, layout.label_bytes + 3 * 32 * 32
    if size == 0 or size % record_bytes:
        raise ValueError(
            f"{path} is truncated: expected a multiple of {record_bytes} bytes, got {size}"
        )
    return np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, record_bytes)
