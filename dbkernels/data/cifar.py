"""CIFAR-10 and CIFAR-100 as their binary archives hold them, mapped where they lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dbkernels.data.formats import Arrays


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


class Chain:
    """Arrays of equal samples, one after the other, without a copy of the whole."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        samples = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for index, part in enumerate(self.parts):
            mine = owner == index
            samples[mine] = part[rows[mine] - self.starts[index]]
        return samples


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
    records = [_map_records(folder / name, layout) for name in names]
    images = Chain([part[:, layout.label_bytes :].reshape(-1, 3, 32, 32) for part in records])
    labels = np.concatenate([part[:, layout.label_bytes - 1] for part in records])
    return Arrays(images, labels.astype(np.int64), layout.num_classes)


def _map_records(path: Path, layout: CifarLayout) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    size, record_bytes = path.stat().st_size, layout.label_bytes + 3 * 32 * 32
    if size == 0 or size % record_bytes:
        raise ValueError(
            f"{path} is truncated: expected a multiple of {record_bytes} bytes, got {size}"
        )
    return np.memmap(path, np.uint8, mode="r").reshape(-1, record_bytes)
