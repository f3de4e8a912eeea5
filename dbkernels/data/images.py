"""Labelled images from local files, and the order in which the blocks see them.

What `open_data` reads; nothing is downloaded, written or unpickled:

    source                  train                       test
    "digits"                scikit-learn's digits       a stratified fifth of them, held out
    "fashion"               Debian's dataset-fashion-mnist, and its test images
    folder of images        train/<class>/*.png ...     test/<class>/ or val/<class>/
    folder of CIFAR files   data_batch_1.bin ...        test_batch.bin; CIFAR-100: train, test
    folder of IDX files     train-images-idx3-ubyte ... t10k-images-idx3-ubyte ..., each or .gz
    name.npz                images, labels              test_images, test_labels
    name.npy (latents)      name.npy, name_labels.npy   name_test.npy, name_test_labels.npy

Images stay on disk and are read, or decoded, for each batch. Only the digits, packed IDX files and
the smaller compressed .npz files are held in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dbkernels.data.cifar import find_cifar, read_cifar
from dbkernels.data.formats import Arrays, Images, read_digits, read_latents, read_npz
from dbkernels.data.idx import fashion, has_idx, read_idx
from dbkernels.data.image_folder import Convert, read_folder
from dbkernels.data.order import samples_at
from dbkernels.ops.philox import generator, stream_seed
from dbkernels.settings import check_choice

Batch = dict[str, Tensor]  # of images: "image" (B, C, H, W) float32 and "label" (B,) int64
Put = Callable[[Tensor], Tensor]  # brings a tensor of the host to where it is used

MOST_LISTED = 2**24  # samples whose order is listed, in 128 MiB; that of more is computed
# ends the key of the sample order, so that no other user of (seed, block, step) shares its stream
_ORDER_STREAM = 1


class Data(Protocol):
    """What a trainer reads: samples by index, from 0 to the length.

    It may also have `read(indices)`, which gives them on the host in fewer bytes, and
    `finish(batch)`, which makes of these, once they are where they are wanted, what `batch` gives.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """Read some samples.

        Args:
            indices:  (B,) int64, each in [0, len(self)); repeats are allowed
            put:      brings what was read to where the batch is wanted, such as `Staging.put`
        Returns:
            Tensors (B, ...) by name.
        """


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a data set: images read when they are asked for, and all of its labels.

    Pixels (uint8) leave in [-1, 1], floating-point images as they are stored.
    """

    images: Images  # (N, C, H, W)
    labels: Tensor  # (N,) int64, each in [0, num_classes)
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`: "image", (B, C, H, W) float32, and "label", (B,) int64.

        Raises:
            ValueError: the indices are malformed, an image file cannot be used, or a
                floating-point image is not finite in float32.
        """
        return self.finish({name: put(each) for name, each in self.read(indices).items()})

    def read(self, indices: Tensor) -> Batch:
        """As `batch`, but pixels are uint8 still: a quarter of the bytes to bring elsewhere."""
        indices = check_indices(indices, len(self))
        pixels = self.images[indices.numpy()]
        if pixels.dtype == np.uint8:
            image = torch.from_numpy(np.ascontiguousarray(pixels))
        else:
            image = finite(pixels, indices, "images")
        return {"image": image, "label": self.labels[indices]}

    @staticmethod
    def finish(batch: Batch) -> Batch:
        """What `batch` gives, of what `read` gave."""
        image = batch["image"]
        return {**batch, "image": scaled(image) if image.dtype == torch.uint8 else image}


def check_indices(indices: Tensor, count: int) -> Tensor:
    """Indices of samples, (B,) int64, on the host.

    Raises:
        ValueError: they have another shape or dtype, or one is not in [0, count).
    """
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(f"indices must be (B,) int64, got {tuple(indices.shape)} {indices.dtype}")
    indices = indices.cpu()
    outside = indices[(indices < 0) | (indices >= count)]
    if len(outside):
        raise ValueError(f"indices must be in [0, {count}), got {outside[0].item()}")
    return indices


def scaled(pixels: Tensor) -> Tensor:
    """Pixels (...) uint8 as they leave, float32 in [-1, 1]."""
    # the subtraction is exact, so one rounding is left and every device gives the same bits
    return pixels.to(torch.float32).sub_(127.5).mul_(1 / 127.5)


def pixels_of(image: Tensor) -> Tensor:
    """The pixels (...) uint8 that `scaled` made an image of, exactly."""
    return image.mul(127.5).add_(127.5).round_().to(torch.uint8)


def finite(values: np.ndarray, indices: Tensor, name: str) -> Tensor:
    """Numbers (B, ...) of some samples as float32.

    Raises:
        ValueError: one is not finite; the sample's index is told.
    """
    with np.errstate(over="ignore"):  # a float64 past float32 becomes inf, and is reported below
        found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    are = found.isfinite().flatten(1).all(1)
    if not are.all():
        raise ValueError(f"{name} must be finite in float32, sample {indices[~are][0]} is not")
    return found


def open_data(
    source: str | Path,
    split: Literal["train", "test"] = "train",
    num_classes: int | None = None,
    *,
    convert: Convert = "none",
) -> ImageData:
    """Open one split of a local data set; the table above lists the sources.

    Args:
        source:       "digits", "fashion", or the path of a folder, an .npz or an .npy file
        split:        "train" or "test"
        num_classes:  bound on the labels; None takes the format's own count, else the number of
                      class folders, else one more than the largest label of either split
        convert:      channels of the images of a folder: "grey" and "rgb" make one and three of
                      whatever they have, with 8 bits each and on white where they are transparent;
                      "none" refuses images that differ or would lose something
    Returns:
        The split, with its labels checked and its images read when they are asked for.
    Raises:
        MissingSplit: the source has none of that split.
        ValueError: the source, its split, its images or its labels cannot be used.
    """
    check_choice("split", split, ("train", "test"))
    arrays = _read(source, split, convert)
    shape, dtype, labels = arrays.images.shape, arrays.images.dtype, arrays.labels
    if 0 in shape:
        raise ValueError(f"the {split} images of {source} are empty: shape {tuple(shape)}")
    if dtype != np.uint8 and dtype.kind != "f":
        raise ValueError(f"images must be uint8 or floating point, got {dtype} in {source}")
    if len(labels) != shape[0]:
        raise ValueError(
            f"{source} must have one label per {split} image: "
            f"{shape[0]} images, {len(labels)} labels"
        )
    bound = arrays.num_classes if num_classes is None else num_classes
    if labels.max() >= bound:
        raise ValueError(f"labels must be in [0, {bound}), got {labels.max()} in {source}")
    return ImageData(arrays.images, torch.from_numpy(labels), bound)


def _read(source: str | Path, split: str, convert: Convert) -> Arrays:
    path = fashion() if source == "fashion" else Path(source)
    is_folder = source != "digits" and path.is_dir()
    cifar = find_cifar(path) if is_folder else None
    idx = is_folder and has_idx(path)
    if is_folder and not cifar and not idx:
        return read_folder(path, split, convert)
    if convert != "none":
        raise ValueError(f"convert must be none where data is no folder of images, got {convert}")
    if source == "digits":
        return read_digits(split)
    if not path.exists():
        raise ValueError(
            f"data source {source} does not exist: expected 'digits', 'fashion' or a path"
        )
    if cifar:
        return read_cifar(*cifar, split)
    if idx:
        return read_idx(path, split)
    readers = {".npz": read_npz, ".npy": read_latents}
    if path.suffix not in readers:
        raise ValueError(f"unknown format {path.name}: expected a folder, an .npz or an .npy file")
    return readers[path.suffix](path, split)


def batch_indices(count: int, batch_size: int, *, seed: int, block: int, step: int) -> Tensor:
    """Name the samples of one step of one block, with nothing remembered between calls.

    A block sees one permutation of the samples after another, one per epoch. Batches run across
    their ends: no sample is dropped, and each is seen once per epoch.

    Args:
        count:       samples in the data set
        batch_size:  samples per step; may exceed count
        seed:        of the run
        block:       each block has an order of its own
        step:        of this block, from 0
    Returns:
        (batch_size,) int64 on the CPU, for ImageData.batch.
    Raises:
        ValueError: count or batch_size is below 1, or step is negative.
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "expected count >= 1, batch_size >= 1 and step >= 0, "
            f"got {count}, {batch_size} and {step}"
        )
    first, pieces = step * batch_size, []
    stop = first + batch_size
    while first < stop:
        epoch, offset = divmod(first, count)
        some = range(offset, min(offset + stop - first, count))
        pieces.append(_samples(count, (seed, block, epoch), some))
        first += len(some)
    return torch.cat(pieces)  # a copy, so the caller cannot write into the cache


def _samples(count: int, key: tuple[int, int, int], places: range) -> Tensor:
    """Samples at some places of the order of a seed, a block and an epoch."""
    if count <= MOST_LISTED:
        return _permutation(count, *key)[places.start : places.stop]
    order = stream_seed(*key, _ORDER_STREAM)
    return samples_at(torch.arange(places.start, places.stop), count, order)


# a few blocks in flight, each perhaps between two epochs
@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, block: int, epoch: int) -> Tensor:
    order = generator("cpu", seed, block, epoch, _ORDER_STREAM)
    return torch.randperm(count, generator=order)


def forget_orders() -> None:
    """Drop the orders that are kept: those made under a fake mode serve no run, nor the reverse."""
    _permutation.cache_clear()
