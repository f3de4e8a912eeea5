"""A folder of images, one sub-folder per class, decoded when a batch asks for them."""

import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dbkernels.data.formats import Arrays, MissingSplit, OneByOne
from dbkernels.settings import check_choice

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# a palette is a way to store RGB; other modes (alpha, 16 bits, CMYK) would lose something
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
Convert = Literal["none", "grey", "rgb"]
CONVERTED = {"grey": "L", "rgb": "RGB"}
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # 16 bits of grey, as releases of Pillow name them
WHITE = (255, 255, 255, 255)
TURNED = range(5, 9)  # orientations in which height and width change places
READERS = 16  # of headers, which wait for the disk


def read_folder(root: Path, split: str, convert: Convert) -> Arrays:
    """Open root/train/<class>/ or root/test/<class>/; without either, root/<class>/ is train."""
    check_choice("convert", convert, ("none", *CONVERTED))
    folders = {name: root / name for name in ("train", "test", "val") if (root / name).is_dir()}
    if not folders:
        folders["train"] = root
    if "test" not in folders and "val" in folders:
        folders["test"] = folders["val"]
    if split not in folders:
        expected = {"train": "train", "test": "test or val"}[split]
        raise MissingSplit(f"{root} has no {split} split: expected a folder {expected} inside it")
    # the training folder names the classes, so that a test split may lack some of them
    classes = [folder.name for folder in _class_folders(folders.get("train", folders[split]))]
    paths, labels = [], []
    for folder in _class_folders(folders[split]):
        if folder.name not in classes:
            raise ValueError(f"class {folder} is not a class of the train split: {classes}")
        files = _image_files(folder)
        paths += files
        labels += [classes.index(folder.name)] * len(files)
    _warn_of_others(folders[split])
    shape = _one_shape(paths, convert)
    images = OneByOne(paths, shape, partial(_decode, expected=shape, convert=convert))
    return Arrays(images, np.array(labels, dtype=np.int64), len(classes))


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _class_folders(folder: Path) -> list[Path]:
    found = [path for path in _visible(folder) if path.is_dir()]
    if not found:
        raise ValueError(
            f"{folder} has no data: expected CIFAR's .bin files, IDX files or one folder a class"
        )
    return sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _image_files(folder: Path) -> list[Path]:
    visible = _visible(folder)
    found = [path for path in visible if _is_image(path)]
    if not found:
        holds = f", got {_counted(visible)}" if visible else ""
        raise ValueError(f"class folder {folder} is empty: expected images {SUFFIXES}{holds}")
    return sorted(found)


def _warn_of_others(folder: Path) -> None:
    """Name what lies in a split and is not read."""
    others = [path for path in _visible(folder) if not path.is_dir()]
    for inside in _class_folders(folder):
        others += [path for path in _visible(inside) if not _is_image(path)]
    if others:
        warnings.warn(
            f"of {folder} only {', '.join(SUFFIXES)} files in the folders of its classes are read; "
            f"left out: {_counted(others)}, such as {min(others)}",
            stacklevel=2,
        )


def _counted(paths: list[Path]) -> str:
    """Files by suffix, and folders."""
    kinds = Counter(
        "folder" if path.is_dir() else f"{path.suffix.lower() or 'unnamed'} file" for path in paths
    )
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(kinds.items()))


# headers


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header was read; what its decoder says is one sentence."""
    try:
        with Image.open(path) as image:
            yield image
    # Pillow reports some broken files as SyntaxError
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def _mode(image: Image.Image, path: Path, convert: Convert) -> str:
    """L or RGB, which an image is to have."""
    if convert != "none":
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError(f"{path} must have 8 or 16 bits a channel, got mode {image.mode}")
        return CONVERTED[convert]
    if image.mode not in MODES:
        raise ValueError(f"{path} must be a grey or RGB image, got mode {image.mode}")
    if "transparency" in image.info:
        raise ValueError(f"{path} must be opaque, got a transparent colour")
    if any(";16B" in str(tile.args) for tile in image.tile):  # of a PNG
        raise ValueError(f"{path} must have 8 bits a channel, got 16")
    return MODES[image.mode]


def _shape(image: Image.Image, path: Path, convert: Convert) -> tuple[int, ...]:
    """(C, H, W) of what an image becomes; nothing of it is decoded."""
    # Pillow would decode a PNG to find a tag that stands behind its pixels
    tags = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
    turned = tags.get(ExifTags.Base.Orientation) in TURNED
    return len(_mode(image, path, convert)), *(image.size if turned else image.size[::-1])


def _header(path: Path, convert: Convert) -> tuple[int, ...]:
    with _opened(path) as image:
        return _shape(image, path, convert)


def _one_shape(paths: list[Path], convert: Convert) -> tuple[int, ...]:
    """The shape (C, H, W) that all images have."""
    with ThreadPoolExecutor(READERS) as pool:
        shapes = list(pool.map(partial(_header, convert=convert), paths))
    others = [pair for pair in zip(paths, shapes, strict=True) if pair[1] != shapes[0]]
    if others:
        more = f", and {len(others) - 1} more differ" if others[1:] else ""
        raise ValueError(f"{_unlike(*others[0], expected=shapes[0])}{more}")
    return shapes[0]


def _unlike(path: Path, got: tuple[int, ...], *, expected: tuple[int, ...]) -> str:
    how = "; convert grey or rgb gives all the same channels" if expected[0] != got[0] else ""
    return (
        f"{path} must have the shape (C, H, W) of the first image, expected {expected}, got "
        f"{got}{how}"
    )


# pixels


def _decode(path: Path, expected: tuple[int, ...], convert: Convert) -> np.ndarray:
    """Pixels (C, H, W) of one file; the size is checked before anything is decoded."""
    with _opened(path) as image:
        if (shape := _shape(image, path, convert)) != expected:
            raise ValueError(_unlike(path, shape, expected=expected))
        ImageOps.exif_transpose(image, in_place=True)
        mode = _mode(image, path, convert)
        pixels = np.asarray(_opaque(image).convert(mode))
    shape = len(mode), *pixels.shape[:2]
    if shape != expected:
        raise ValueError(_unlike(path, shape, expected=expected))
    return pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """An image in 8 bits a channel and opaque: what is transparent lies on white."""
    clear = image.info.get("transparency")
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        values = np.where(values == clear, 2**16 - 1, values)  # of no value where clear is None
        return Image.fromarray(((values * 255 + 2**15) // (2**16 - 1)).astype(np.uint8))
    if clear is None and image.mode not in ALPHA:
        return image
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), seen)
