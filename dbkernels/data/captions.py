"""Images or latents with embeddings of what they show, which a text encoder made before.

    train    name.npy        name_text.npy        name_pooled.npy, where there is one
    test     name_test.npy   name_test_text.npy   name_test_pooled.npy

Rows stay on disk and are read for each batch. Prompts are the arrays `text` and, where the encoder
gave them, `pooled` of an .npz.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dbkernels.data.formats import Images, MissingSplit, open_npy, read_member
from dbkernels.data.images import Batch, Put, check_indices, finite
from dbkernels.settings import check_choice

FLOATS = (np.float16, np.float32)
PROMPTS = {"text": ("N", "S", "E"), "pooled": ("N", "P")}


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """One split: an image, the embeddings of its text's tokens, and one of all the text."""

    images: Images
    """(N, C, H, W) float16 or float32."""
    text: Images
    """(N, S, E), the same dtypes."""
    pooled: Images | None = None
    """(N, P), the same dtypes; None where the encoder gave none."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def text_shape(self) -> tuple[int, int]:
        """Tokens and width of a text's embeddings."""
        return self.text.shape[1:]

    @property
    def pooled_dim(self) -> int:
        """Width of the embedding of all the text; 0 where there is none."""
        return 0 if self.pooled is None else self.pooled.shape[1]

    def arrays(self) -> dict[str, Images]:
        """By the names that a batch has for them."""
        found = {"image": self.images, "text": self.text}
        return found if self.pooled is None else {**found, "pooled": self.pooled}

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`: "image", "text" and, where there is one, "pooled", float32.

        Raises:
            ValueError: the indices are malformed, or a number is not finite in float32.
        """
        indices = check_indices(indices, len(self))
        rows = indices.numpy()
        return {name: put(finite(a[rows], indices, name)) for name, a in self.arrays().items()}


def open_captions(source: str | Path, split: Literal["train", "test"] = "train") -> CaptionedImages:
    """Open one split of images with embeddings of their texts; the table above names its files.

    Raises:
        MissingSplit: there is no image file of that split.
        ValueError: a file is missing or cannot be used, or they have different numbers of rows.
    """
    check_choice("split", split, ("train", "test"))
    path = Path(source)
    if path.suffix != ".npy":
        raise ValueError(
            f"images with texts must be an .npy file with embeddings beside it, got {source}"
        )
    stem = {"train": path.stem, "test": f"{path.stem}_test"}[split]
    image, text, pooled = (path.with_name(f"{stem}{end}.npy") for end in ("", "_text", "_pooled"))
    if not image.is_file():
        raise MissingSplit(f"{source} has no {split} split: expected {image.name} beside it")
    images = _opened(image, "images", ("N", "C", "H", "W"))
    texts = _opened(text, "text", ("N", "S", "E"))
    of_all = _opened(pooled, "pooled", ("N", "P")) if pooled.is_file() else None
    for file, array in ((text, texts), (pooled, of_all)):
        if array is not None and array.shape[0] != images.shape[0]:
            raise ValueError(
                f"{file} must have a row for each of {images.shape[0]} images, got {array.shape[0]}"
            )
    return CaptionedImages(images, texts, of_all)


def _opened(path: Path, name: str, axes: tuple[str, ...]) -> Images:
    return _checked(open_npy(path), name, axes, path)


def _checked(array: Images, name: str, axes: tuple[str, ...], path: Path) -> Images:
    if len(array.shape) != len(axes) or array.dtype not in FLOATS or 0 in array.shape:
        raise ValueError(
            f"{name} must be ({', '.join(axes)}) float16 or float32 and not empty, "
            f"got {array.shape} {array.dtype}: {path}"
        )
    return array


def read_prompts(path: Path) -> Batch:
    """The embeddings of an .npz: "text" (N, S, E) and, where it is there, "pooled" (N, P), float32.

    Raises:
        ValueError: it is no such file, or a number in it is not finite.
    """
    if not path.is_file():
        raise ValueError(f"prompts must be an .npz of embeddings, got {path}, which is no file")
    found = {}
    for name, axes in PROMPTS.items():
        array = read_member(path, name)
        if array is None:
            continue
        rows = np.arange(_checked(array, name, axes, path).shape[0])
        found[name] = finite(array[rows], torch.from_numpy(rows), name)
    if "text" not in found:
        raise ValueError(f"{path} must have an array text, got none")
    if len({len(tensor) for tensor in found.values()}) > 1:
        raise ValueError(f"text and pooled of {path} must have as many rows as each other")
    return found
