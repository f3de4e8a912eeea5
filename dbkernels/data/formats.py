"""Readers of the data formats: files to images (N, C, H, W), labels (N,) and a number of classes.

The arrays of an .npz do not say where their channels are. One rule finds them and never guesses:
they are dimension 3 if that is 1, 3 or 4 and dimension 1 is not; dimension 1 if that is 1, 3 or 4
and dimension 3 is not; every other shape is refused.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dbkernels.data.rows import RowsOnDisk

# what readers of others raise at a damaged file, beside what zipfile says
DAMAGED = (ValueError, OSError, EOFError, SyntaxError, TokenError, OverflowError, zlib.error)
# an encrypted member, or a method of compression that this Python lacks, is a RuntimeError
ZIP_DAMAGED = (zipfile.BadZipFile, RuntimeError, struct.error)
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MAX_COMPRESSED_BYTES = 2**28  # compressed images up to this many bytes are read whole
DIGITS_SPLIT_SEED = 0  # every run must hold out the same digits


class Images(Protocol):
    """Images that are read when they are indexed with row numbers, and not before."""

    shape: tuple[int, ...]  # (N, C, H, W)
    dtype: np.dtype

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...  # (B,) int64 -> (B, C, H, W)


class OneByOne:
    """`Images` of bytes that are read one by one.

    Args:
        sources:  of each image, what `read` takes
        shape:    (C, H, W), of every image
        read:     source -> pixels (C, H, W)
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, sources: Sequence[object], shape: tuple[int, ...], read: Callable[..., np.ndarray]
    ):
        self.sources, self.shape, self.read = sources, (len(sources), *shape), read

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for image, row in zip(images, rows, strict=True):
            image[:] = self.read(self.sources[row])
        return images


class MissingSplit(ValueError):
    """A source has none of the split that is asked for."""


class Arrays(NamedTuple):
    """One split as its files hold it."""

    images: Images
    labels: np.ndarray  # int64, none negative
    num_classes: int


def _labels(labels: RowsOnDisk | np.ndarray, name: str | Path) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be (N,) integers, got {labels.shape} {labels.dtype}: {name}")
    labels = labels[range(len(labels))].astype(np.int64)
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {labels.min()} in {name}")
    return labels


def _count_classes(splits: Sequence[np.ndarray]) -> int:
    """Both splits count: one that lacks the last class must not make a smaller model."""
    return 1 + max((int(labels.max()) for labels in splits if len(labels)), default=0)


# scikit-learn's digits


def read_digits(split: str) -> Arrays:
    """Real 8x8 handwritten digits; a stratified fifth is the test split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("the digits need scikit-learn: pip install dbkernels[demo]") from error
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)  # stored as 0..16
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    rows = train if split == "train" else test
    return Arrays(images[rows], labels[rows], len(digits.target_names))


# latents


def read_latents(path: Path, split: str) -> Arrays:
    """A .npy of float16 or float32 latents (N, C, H, W), with its labels in a file beside it."""
    stems = {"train": path.stem, "test": f"{path.stem}_test"}
    files = {name: path.with_name(f"{stem}_labels.npy") for name, stem in stems.items()}
    if not (own := path.with_name(f"{stems[split]}.npy")).is_file():
        raise MissingSplit(
            f"{path} has no {split} split: expected {own.name} and {files[split].name} beside it"
        )
    images = open_npy(own)
    if images.ndim != 4 or images.dtype not in (np.float16, np.float32):
        raise ValueError(
            "latents must be (N, C, H, W) float16 or float32, "
            f"got {images.shape} {images.dtype}: {path}"
        )
    labels = {
        name: _labels(open_npy(file), file)
        for name, file in files.items()
        if name == split or file.exists()
    }
    return Arrays(images, labels[split], _count_classes(list(labels.values())))


def open_npy(path: Path) -> RowsOnDisk:
    """The array of a .npy file, whose rows stay there.

    Raises:
        ValueError: there is no such file, or it is no whole array of numbers.
    """
    if not path.is_file():
        raise ValueError(f"file {path} is missing")
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
        expected = start + dtype.itemsize * math.prod(shape)
        if (size := path.stat().st_size) < expected:
            raise ValueError(f"{shape} {dtype} in {size} bytes, of which it needs {expected}")
    except DAMAGED as error:
        raise ValueError(f"{path} is not a whole .npy array of numbers: {error}") from error
    return RowsOnDisk(path, shape, dtype, offset=start, fortran=fortran)


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis changes fastest, and dtype; read to where the numbers begin."""
    major, minor = np.lib.format.read_magic(file)
    known = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if major not in known:
        raise ValueError(f"version {major}.{minor} of the format")
    shape, fortran, dtype = known[major](file)
    if dtype.hasobject or min(shape, default=0) < 0 or not dtype.itemsize:
        raise ValueError(f"{shape} {dtype}")
    return shape, fortran, dtype


# .npz


def read_member(path: Path, name: str) -> Images | None:
    """An array of an .npz; None where it has none of that name.

    Raises:
        ValueError: it is no whole .npz file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _open_member(archive, name) if f"{name}.npy" in archive.namelist() else None
    except ZIP_DAMAGED as error:
        raise ValueError(f"{path} is not a whole .npz file: {error!s:.200}") from error


def read_npz(path: Path, split: str) -> Arrays:
    """`images` and `labels` of an .npz, or `test_images` and `test_labels`."""
    prefix = {"train": "", "test": "test_"}[split]
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if f"{prefix}images" not in names:
                raise MissingSplit(
                    f"{path} has no array {prefix}images for the {split} split: {names}"
                )
            if f"{prefix}labels" not in names:
                raise ValueError(
                    f"{path} has no array {prefix}labels for the {split} split: {names}"
                )
            labels = {
                name: _labels(_open_member(archive, name), f"{name} of {path}")
                for name in ("labels", "test_labels")
                if name in names
            }
            images = _open_member(archive, f"{prefix}images")
    except ZIP_DAMAGED as error:
        raise ValueError(f"{path} is not a whole .npz file: {error!s:.200}") from error
    images = _channels_first(images, path)
    return Arrays(images, labels[f"{prefix}labels"], _count_classes(list(labels.values())))


def _open_member(archive: zipfile.ZipFile, name: str) -> RowsOnDisk | np.ndarray:
    """An array where it lies inside the zip; one that is compressed, in memory."""
    info = archive.getinfo(f"{name}.npy")
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.file_size > MAX_COMPRESSED_BYTES:
        raise ValueError(
            f"{name} of {archive.filename} is compressed and has {info.file_size} bytes, over "
            f"{MAX_COMPRESSED_BYTES}: save it with np.savez, which can be read from disk"
        )
    with archive.open(info) as file:
        try:
            shape, fortran, dtype = _read_header(file)
            start = file.tell()
            expected = start + dtype.itemsize * math.prod(shape)
            # before anything of that size is allocated
            if expected != info.file_size:
                raise ValueError(f"{shape} {dtype} in {info.file_size} bytes")
            if not stored:
                # numpy, which alone would believe the header, and allocate what that says
                with archive.open(info) as whole:
                    return np.lib.format.read_array(whole, allow_pickle=False)
            # to its end, where zipfile compares the checksum
            while file.read(2**24):
                pass
        except DAMAGED as error:
            raise ValueError(
                f"{name} of {archive.filename} is not a whole array of numbers: {error}"
            ) from error
    start += _data_offset(archive.filename, info.header_offset)
    return RowsOnDisk(archive.filename, shape, dtype, offset=start, fortran=fortran)


def _data_offset(path: str, header_offset: int) -> int:
    """The name and extra field before the data are measured by the local header alone."""
    with open(path, "rb") as file:
        file.seek(header_offset)
        name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(30))
    return header_offset + 30 + name_bytes + extra_bytes


def _channels_first(images: RowsOnDisk | np.ndarray, path: Path) -> RowsOnDisk | np.ndarray:
    if images.ndim != 4:
        raise ValueError(f"images must have 4 dimensions, got {images.shape} in {path}")
    first, last = images.shape[1] in CHANNELS, images.shape[3] in CHANNELS
    if first == last:
        raise ValueError(
            f"images must be (N, H, W, C) or (N, C, H, W) with C in {CHANNELS} "
            f"and only one way to read them, got {images.shape} in {path}"
        )
    return images.transpose(0, 3, 1, 2) if last else images
