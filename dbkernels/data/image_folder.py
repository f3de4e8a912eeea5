"""A folder of images, one sub-folder per class, decoded when a batch asks for them."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dbkernels.data.formats import Arrays, OneByOne

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# a palette is a way to store RGB; other modes (alpha, 16 bits, CMYK) would lose something
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


def read_folder(root: Path, split: str) -> Arrays:
    """Open root/train/<class>/ or root/test/<class>/; without either, root/<class>/ is train."""
    folders = {name: root / name for name in ("train", "test", "val") if (root / name).is_dir()}
    if not folders:
        folders["train"] = root
    if "test" not in folders and "val" in folders:
        folders["test"] = folders["val"]
    if split not in folders:
        expected = {"train": "train", "test": "test or val"}[split]
        raise ValueError(f"{root} has no {split} split: expected a folder {expected} inside it")
    # the training folder names the classes, so that a test split may lack some of them
    classes = [folder.name for folder in _class_folders(folders.get("train", folders[split]))]
    paths, labels = [], []
    for folder in _class_folders(folders[split]):
        if folder.name not in classes:
            raise ValueError(f"class {folder} is not a class of the train split: {classes}")
        files = _image_files(folder)
        paths += files
        labels += [classes.index(folder.name)] * len(files)
    shape = _decode(paths[0], None).shape
    images = OneByOne(paths, shape, partial(_decode, expected=shape))
    return Arrays(images, np.array(labels, dtype=np.int64), len(classes))


def _class_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} has no data: expected CIFAR's .bin files or one folder a class")
    return sorted(found)


def _image_files(folder: Path) -> list[Path]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = [path for path in visible if path.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"class folder {folder} is empty: expected images {SUFFIXES}")
    return sorted(found)


def _decode(path: Path, expected: tuple[int, ...] | None) -> np.ndarray:
    """Pixels (C, H, W) of one file; the size is checked before anything is decoded."""
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ValueError(f"{path} must be a grey or RGB image, got mode {image.mode}")
            if "transparency" in image.info:
                raise ValueError(f"{path} must be opaque, got a transparent colour")
            if any(";16B" in str(tile.args) for tile in image.tile):  # of a PNG
                raise ValueError(f"{path} must have 8 bits a channel, got 16")
            ImageOps.exif_transpose(image, in_place=True)
            mode = MODES[image.mode]
            shape = (len(mode), image.height, image.width)
            if expected is not None and shape != expected:
                raise ValueError(
                    f"{path} must have the shape (C, H, W) of the first image, "
                    f"expected {expected}, got {shape}"
                )
            pixels = np.asarray(image.convert(mode))
    # Pillow reports some broken files as SyntaxError
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
