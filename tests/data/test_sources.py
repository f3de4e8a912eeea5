"""What `open_data` reads, and the message for each source that it cannot use."""

import gzip
import io
import os
import struct
import sys
import zipfile
import zlib
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.forked import forked
from PIL import Image

from dbkernels.data import formats
from dbkernels.data import idx as idx_module
from dbkernels.data.images import open_data


def pixels(*shape):
    return (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)


GREY = pixels(2, 1, 8, 8)
LATENTS = np.linspace(-7, 7, 5 * 4 * 2 * 2).reshape(5, 4, 2, 2).astype(np.float16)
PICKLED = np.array([{}, {}], dtype=object)


def everything(data):
    return data.batch(torch.arange(len(data)))


def save_image(path, mode="RGB", size=(6, 4), value=0):
    """One image of `size` (W, H), its pixels distinct and set apart by `value`; as (C, H, W)."""
    shape = (*size[::-1], 3) if mode == "RGB" else (*size[::-1], 1)
    content = (value + np.arange(np.prod(shape)) % 100).astype(np.uint8).reshape(shape)
    Image.fromarray(content.squeeze(2) if mode != "RGB" else content).convert(mode).save(path)
    return content.transpose(2, 0, 1)


def write(folder, files):
    """Write each file by what its content is, delete it, or change the bytes that it has."""
    for name, content in files.items():
        (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, str):  # the mode of an image
            save_image(path, content)
        elif isinstance(content, np.ndarray):
            np.save(path, content, allow_pickle=True)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return folder


# each saves a source: where it is, its classes, the files that are read for each batch, and its
# samples, of which so many train


def npz(folder, name="a", save=np.savez, read="*.npz", last=2, dtype=np.uint8, order="C"):
    images, labels = pixels(5, 5, 6, 3).astype(dtype), [0, 1, 4, 1, last]
    train = {"images": np.asarray(images[:3], order=order), "labels": np.uint8(labels[:3])}
    test = {"test_images": images[3:], "test_labels": np.int16(labels[3:])}
    path = folder / f"{name}.npz"
    save(path, first=np.arange(77), **train, **test, last=np.ones(9))
    return str(path), max(labels) + 1, read, images.transpose(0, 3, 1, 2), labels, 3


def latents(folder, dtype=np.float16, has_test=True):
    images, labels, count = LATENTS.astype(dtype), [0, 6, 2, 1, 0], 5 if has_test else 3
    write(folder, {"z.npy": images[:3], "z_labels.npy": np.uint8(labels[:3])})
    if has_test:
        write(folder, {"z_test.npy": images[3:], "z_test_labels.npy": np.array(labels[3:])})
    return folder / "z.npy", 7, "z.npy", images[:count], labels[:count], 3


def cifar(folder, classes=10, inside="", has_train=True):
    (root := folder / inside).mkdir(exist_ok=True)
    # files of different lengths tell a sample's file from its place in the file
    sizes, label_bytes = {"train.bin": 3, "test.bin": 2}, 2
    if classes == 10:
        sizes = {f"data_batch_{i}.bin": n for i, n in enumerate((2, 1, 3, 1, 4), start=1)}
        sizes["test_batch.bin"], label_bytes = 2, 1
    samples = pixels(sum(sizes.values()), label_bytes + 3072)
    labels = (classes - 1 - 7 * np.arange(len(samples))) % classes
    samples[:, label_bytes - 1] = labels  # the last of them is the fine one
    parts = np.split(samples, np.cumsum([*sizes.values()])[:-1])
    for name, part in zip(sizes, parts, strict=True):
        if has_train or "test" in name:
            part.tofile(root / name)
    images, count = samples[:, label_bytes:].reshape(-1, 3, 32, 32), len(samples) - 2
    first = 0 if has_train else count
    return folder, classes, "*.bin", images[first:], labels[first:].tolist(), count - first


def folder(root, mode="RGB"):
    names, images = ["a/z.png", "b/10.png", "b/2.png", "c/0.bmp"], {}
    names = [*(f"train/{name}" for name in names), "test/a/0.png"]
    for name in reversed(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images[name] = save_image(root / name, mode, value=20 * len(images))
    return root, 3, "train/*/*", np.stack([images[name] for name in names]), [0, 1, 1, 2, 0], 4


def idx_bytes(numbers):
    return struct.pack(f">HBB{numbers.ndim}I", 0, 8, numbers.ndim, *numbers.shape) + bytes(numbers)


def idx(folder, packed=False, dot="-", test="t10k"):
    images, labels = pixels(5, 7, 6), [0, 6, 2, 1, 0]
    for name, at in (("train", slice(3)), (test, slice(3, None))):
        for kind, numbers in (("images", images[at]), ("labels", np.uint8(labels[at]))):
            path = folder / f"{name}-{kind}{dot}idx{numbers.ndim}-ubyte"
            path.write_bytes(idx_bytes(numbers.copy()))
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    return folder, 7, None if packed else "*", images[:, None], labels, 3


SOURCES = [
    (idx, {}),
    (idx, {"dot": ".", "test": "test"}),
    (idx, {"packed": True}),
    (npz, {}),
    (npz, {"last": 6}),
    (npz, {"name": "a name that moves the offset of the data", "order": "F"}),
    (npz, {"dtype": np.float16}),
    (npz, {"dtype": np.float64, "order": "F"}),
    (npz, {"save": np.savez_compressed, "read": None}),
    (latents, {}),
    (latents, {"dtype": np.float32}),
    (latents, {"has_test": False}),
    (cifar, {}),
    (cifar, {"inside": "cifar-10-batches-bin"}),
    (cifar, {"has_train": False}),
    (cifar, {"classes": 100}),
    (cifar, {"classes": 100, "inside": "cifar-100-binary"}),
    (folder, {}),
    (folder, {"mode": "L"}),
]


@pytest.mark.parametrize(("save", "options"), SOURCES)
def test_a_source_has_its_samples_in_any_order_and_maps_no_file(tmp_path, save, options):
    source, num_classes, _, stored, labels, train = save(tmp_path, **options)
    splits = {"train": slice(0, train), "test": slice(train, None)}
    opened = {split: open_data(source, split) for split, at in splits.items() if labels[at]}
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for split, data in opened.items():
        own, images = labels[splits[split]], stored[splits[split]]
        assert (len(data), data.num_classes) == (len(own), num_classes)
        assert data.image_shape == images.shape[1:]
        rows = [len(own) - 1, *range(len(own)), 0]
        batch, is_pixels = data.batch(torch.tensor(rows)), images.dtype == np.uint8
        assert batch["label"].tolist() == [own[row] for row in rows]
        assert batch["label"].dtype == torch.int64
        # bytes are scaled to [-1, 1], floats are as they are
        exact = torch.from_numpy(np.float32(images / 127.5 - 1 if is_pixels else images)[rows])
        torch.testing.assert_close(batch["image"], exact, atol=1e-6 * is_pixels, rtol=0)


@pytest.mark.parametrize(("save", "options"), SOURCES)
def test_a_file_that_is_cut_short_while_it_is_in_use_is_named(tmp_path, save, options):
    source, _, read, *_, train = save(tmp_path, **options)
    data = open_data(source, "train" if train else "test")
    files = [path for path in tmp_path.rglob(read or "*.npz") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 8)
    ended = forked(lambda: everything(data))
    if read is None:  # it is in memory
        assert ended.code == 0, ended.err
        return
    said = ended.err.splitlines()[-1]
    assert ended.code == 1 and said.startswith("ValueError: "), ended
    assert any(str(path) in said for path in files)


# scikit-learn's digits


def test_digits_are_held_out_by_class_and_never_shared():
    train, test = open_data("digits"), open_data("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 8, 8) and train.num_classes == test.num_classes == 10
    difference = train.labels.bincount() / len(train) - test.labels.bincount() / len(test)
    assert difference.abs().max() < 0.003
    images = [everything(data)["image"] for data in (train, test)]
    rows = {tuple(image.flatten().tolist()) for image in torch.cat(images)}
    assert len(rows) == 1797
    assert all(image.min() == -1 and image.max() == 1 for image in images)
    assert np.array_equal(test.images, open_data("digits", "test").images)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install dbkernels\[demo\]"):
        open_data("digits")


# Fashion-MNIST


def test_fashion_is_found_where_debian_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(idx_module, "FASHION", tmp_path / "fashion-mnist")
    with pytest.raises(ValueError, match=r"sudo apt install dataset-fashion-mnist, or give the pa"):
        open_data("fashion")
    (tmp_path / "fashion-mnist").mkdir()
    _, count, _, images, labels, _ = idx(tmp_path / "fashion-mnist", packed=True)
    data = open_data("fashion", "test")
    assert data.labels.tolist() == labels[3:] and data.num_classes == count
    assert np.array_equal(data.images[np.arange(2)], images[3:])


# what only some formats have


def test_a_row_of_sixteen_bytes_is_not_taken_for_sixteen_bits(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(4, 5, 3)).save(tmp_path / "a" / "0.bmp")
    (image,) = open_data(tmp_path).images[np.arange(1)]
    assert np.array_equal(image, pixels(4, 5, 3).transpose(2, 0, 1))


def test_an_image_that_its_camera_has_turned_is_turned_back(tmp_path):
    (exif := Image.Exif())[0x0112] = 6  # the tag of the orientation: a quarter to the right
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(4, 6, 3)).save(tmp_path / "a" / "0.png", exif=exif)
    (image,) = open_data(tmp_path).images[np.arange(1)]
    assert np.array_equal(image, np.rot90(pixels(4, 6, 3), -1).transpose(2, 0, 1))


def two_grey(**arrays):
    """An .npz of two grey images; an array that is None is left out."""
    arrays = {"images": GREY, "labels": [0, 1]} | arrays
    return {name: array for name, array in arrays.items() if array is not None}


def test_a_compressed_npz_is_read_whole_up_to_a_size(tmp_path, monkeypatch):
    np.savez_compressed(path := tmp_path / "a.npz", **two_grey())
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", GREY.size + 128)
    assert np.array_equal(open_data(path).images[np.arange(2)], GREY)
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", GREY.size + 127)
    with pytest.raises(ValueError, match=r"compressed and has 256 bytes.* np.savez, which"):
        open_data(path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_found_first_or_last_and_labels_may_have_more_classes(tmp_path, channels):
    first, path = pixels(2, channels, 8, 5), tmp_path / "a.npz"
    for images in (first, first.transpose(0, 2, 3, 1)):
        write(tmp_path, {"a.npz": two_grey(images=images, labels=[0, 3])})
        for given, classes in ((None, 4), (4, 4), (1000, 1000)):
            data = open_data(path, num_classes=given)
            assert np.array_equal(data.images[range(2)], first)
            assert data.num_classes == classes
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3"):
            open_data(path, num_classes=3)


@pytest.mark.parametrize(
    ("names", "split", "labels", "num_classes"),
    [
        ("train/a/0.png train/b/0.png train/c/0.png test/c/0.png", "test", [2], 3),
        ("train/a/0.png train/b/0.png train/c/0.png val/c/0.png", "test", [2], 3),
        # test comes before val
        ("train/a/0.png val/a/0.png test/a/0.png test/a/1.png", "test", [0, 0], 1),
        ("a/0.png b/0.png", "train", [0, 1], 2),
        ("test/a/0.png", "test", [0], 1),
        *((f"a/0.{suffix}", "train", [0], 1) for suffix in ("jpg", "JPEG", "webp", "bmp")),
    ],
)
def test_the_training_classes_number_those_of_a_split(tmp_path, names, split, labels, num_classes):
    data = open_data(write(tmp_path, dict.fromkeys(names.split(), "RGB")), split)
    assert data.labels.tolist() == labels and data.num_classes == num_classes
    assert everything(data)["image"].shape == (len(labels), 3, 4, 6)


@pytest.mark.parametrize("modes", [["L", "1", "L"], ["RGB", "P", "RGB"], ["P", "RGB"]])
def test_modes_of_one_family_mix_and_what_is_hidden_is_no_image(tmp_path, modes):
    write(tmp_path, {f"a/{i}.png": mode for i, mode in enumerate(modes)})
    write(tmp_path, dict.fromkeys(("a/._0.png", ".cache/0.png", ".README"), b"?"))
    data, channels = open_data(tmp_path), 3 if "RGB" in modes else 1
    assert everything(data)["image"].shape == (len(modes), channels, 4, 6)
    assert data.num_classes == 1


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    others = ("a/1.TIFF", "a/2.tiff", "a/more/3.png", "b/notes", "README.md")
    write(tmp_path, dict.fromkeys(("a/0.png", "b/0.png"), "RGB"))
    write(tmp_path, dict.fromkeys(others, b"?"))
    counts = "1 .md file, 2 .tiff files, 1 folder, 1 unnamed file, such as .*README.md$"
    with pytest.warns(UserWarning, match=f"left out: {counts}"):
        assert len(open_data(tmp_path)) == 2
    (tmp_path / "b/0.png").unlink()
    with pytest.raises(ValueError, match=r"b is empty: expected images .*, got 1 unnamed file"):
        open_data(tmp_path)


def saved_as(mode, array, **more):
    image = Image.fromarray(array)
    if image.mode != mode:
        image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(file := io.BytesIO(), format="JPEG" if mode == "CMYK" else "PNG", **more)
    return file.getvalue()


RED = np.full((2, 2, 3), (200, 0, 0), np.uint8)
HALF = np.full((2, 2, 4), (200, 0, 0, 51), np.uint8)  # a fifth of it, and four of white
CLEAR = {"transparency": (200, 0, 0)}
DEEP = np.full((2, 2), 257 * 90, np.uint16)


@pytest.mark.parametrize(
    ("name", "data", "rgb"),
    [
        ("0.png", saved_as("RGB", RED), (200, 0, 0)),
        ("0.png", saved_as("P", RED), (200, 0, 0)),
        ("0.png", saved_as("L", RED[:, :, 0]), (200, 200, 200)),
        ("0.png", saved_as("1", RED[:, :, 0] | 255), (255, 255, 255)),
        ("0.png", saved_as("I;16", DEEP), (90, 90, 90)),
        ("0.png", saved_as("I;16", DEEP, transparency=257 * 90), (255, 255, 255)),
        ("0.png", saved_as("RGBA", HALF), (244, 204, 204)),
        ("0.png", saved_as("LA", HALF), (216, 216, 216)),
        ("0.png", saved_as("RGB", RED, **CLEAR), (255, 255, 255)),
        ("0.jpg", saved_as("CMYK", RED), (200, 0, 0)),
    ],
    ids=["RGB", "P", "L", "1", "I;16", "I;16-clear", "RGBA", "LA", "RGB-clear", "CMYK"],
)
def test_convert_gives_every_image_of_a_folder_the_channels_that_are_asked_for(
    tmp_path, name, data, rgb
):
    write(tmp_path, {f"a/{name}": data})
    red, green, blue = rgb
    luma = (299 * red + 587 * green + 114 * blue) / 1000  # ITU-R BT.601
    for convert, expected in (("rgb", rgb), ("grey", [luma])):
        opened = open_data(tmp_path, convert=convert)
        assert opened.image_shape == (len(expected), 2, 2)
        (image,) = opened.images[np.arange(1)]
        assert np.abs(image - np.reshape(expected, (-1, 1, 1))).max() <= 1


# sources that cannot be used


def with_a_broken_chunk(image):
    length = image.index(b"IDAT") - 1  # the last byte of the chunk's length
    return image[: length - 1] + b"\0\x20" + image[length + 1 :]


# equal counts of pixels hide a swapped height and width
SHAPE = r"must .* expected \(3, 60, 64\), got"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (60, 64)}, rf"{SHAPE} \(3, 64, 60\)"),
        ({"size": (64, 61)}, rf"{SHAPE} \(3, 61, 64\)"),
        ({"mode": "L"}, rf"{SHAPE} \(1, 60, 64\); convert grey or rgb gives all the same channels"),
    ],
)
def test_an_image_of_another_shape_is_refused_at_the_start_and_when_it_comes(
    tmp_path, options, message
):
    (tmp_path / "a").mkdir()
    for name in ("0", "1", "2"):
        save_image(tmp_path / f"a/{name}.png", size=(64, 60))
    data = open_data(tmp_path)
    for name in ("1", "2"):
        save_image(tmp_path / f"a/{name}.png", **{"size": (64, 60), **options})
    data.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=f"1.png {message}"):
        everything(data)
    with pytest.raises(ValueError, match=f"1.png {message}, and 1 more differ"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "damage", [*(itemgetter(slice(size)) for size in (0, 20, 120)), with_a_broken_chunk]
)
def test_an_image_that_is_damaged_is_refused_by_its_name(tmp_path, damage):
    (tmp_path / "a").mkdir()
    save_image(tmp_path / "a/0.png", size=(64, 60))
    save_image(tmp_path / "a/1.png", size=(64, 60))
    data = open_data(tmp_path)
    write(tmp_path, {"a/1.png": damage})
    data.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"1.png cannot be decoded"):
        everything(data)


def compressed(arrays):
    np.savez_compressed(file := io.BytesIO(), **arrays)
    return file.getvalue()


def with_images(damage):
    """An .npz without images that gets a member of that name."""
    np.savez(file := io.BytesIO(), labels=[0, 1])
    np.save(saved := io.BytesIO(), GREY)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("images.npy", damage(saved.getvalue()))
    return file.getvalue()


def with_a_flipped_pixel():
    """An .npz with more pixels than a reader of its header looks at."""
    np.savez(file := io.BytesIO(), images=pixels(2, 1, 64, 64), labels=[0, 1])
    data = bytearray(file.getvalue())
    data[7000] ^= 1
    return bytes(data)


def png(size, depth):
    """A PNG of RGB without a pixel."""
    header = struct.pack(">IIBBBBB", size, size, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    ends = (struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    parts = (struct.pack(">I", len(data)) + name + data for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(bytes.__add__, parts, ends))


def see_through():
    image = Image.fromarray(pixels(4, 4, 3))
    image.save(file := io.BytesIO(), format="PNG", transparency=(1, 2, 3))
    return file.getvalue()


def with_no_deflated_block(npz):
    start = npz.index(b"images.npy") + len("images.npy") + 20  # past the extra field
    return npz[:start] + b"\xff" + npz[start + 1 :]


TWO_WAYS = r"only one way to read them, got \(2, "
NOT_NUMBERS = "of .*a.npz is not a whole array of numbers"
NOT_WHOLE = "is not a whole .npy array of numbers"
TRUNCATED = r"batch_4.bin is truncated: .* 3073 bytes, got"
ARRAYS = [
    # both, and neither, could be channels
    ({"images": pixels(2, 3, 8, 1)}, "train", f"{TWO_WAYS}3, 8, 1"),
    *(({"images": pixels(2, C, W, W)}, "train", TWO_WAYS) for C, W in ((4, 4), (8, 8), (2, 8))),
    ({"images": pixels(2, 8, 8)}, "train", r"must have 4 dimensions, got \(2, 8, 8\)"),
    ({"images": np.int64(GREY)}, "train", "uint8 or floating point, got int64"),
    ({"images": GREY[:0], "labels": np.zeros(0, int)}, "train", "train images of .* are empty"),
    ({"images": GREY[:, :, :0]}, "train", r"are empty: shape \(2, 1, 0, 8\)"),
    ({"images": None}, "train", "has no array images for the train split"),
    ({"labels": None}, "train", "has no array labels for the train split"),
    ({}, "test", "has no array test_images for the test split"),
    ({"test_images": GREY}, "test", "has no array test_labels for the test split"),
    ({"labels": [0, -1]}, "train", "labels must not be negative, got -1"),
    ({"labels": [0.0, 1.0]}, "train", r"labels must be \(N,\) int.* float64"),
    ({"labels": [True, False]}, "train", "labels must be .* bool"),
    ({"labels": [[0, 1]]}, "train", r"labels must be .* \(1, 2\)"),
    ({"labels": [0]}, "train", "one label per train image: 2 images, 1 labels"),
    ({"labels": [0, 1, 2]}, "train", "2 images, 3 labels"),
    # nothing is unpickled
    ({"images": PICKLED}, "train", f"images {NOT_NUMBERS}"),
    ({"labels": PICKLED}, "train", f"labels {NOT_NUMBERS}"),
]
# a member that claims more than it holds would be mapped over its neighbour
MEMBERS = [
    lambda saved: saved[:-1],
    lambda saved: saved + b"0",
    lambda saved: b"no" + saved,
    lambda saved: saved[:6] + b"\x03" + saved[7:],  # a version of the format that has names
    lambda saved: saved.replace(b"'|u1'", b"'|O' ") + bytes(7 * 2 * 8 * 8),
]
# a source that is whole, the files that are then written, and what is opened of all
BROKEN = [
    *((None, {"a.npz": save(two_grey(**arrays))}, "a.npz", split, message)
      for save in (dict, compressed) for arrays, split, message in ARRAYS),
    *((None, {"a.npz": with_images(damage)}, "a.npz", "train", f"images {NOT_NUMBERS}")
      for damage in MEMBERS),
    (None, {"a.npz": with_no_deflated_block(compressed(two_grey()))}, "a.npz", "train",
     f"images {NOT_NUMBERS}"),
    *((npz, {"a.npz": itemgetter(slice(size))}, "a.npz", "train", "a.npz is not a whole .npz file")
      for size in (0, 100, -30)),
    (None, {"a.npz": with_a_flipped_pixel()}, "a.npz", "train", "a.npz is not .* Bad CRC-32"),
    (latents, {"z.npy": lambda npy: npy.replace(b"), }", b"(, }")}, "z.npy", "train",
     f"z.npy {NOT_WHOLE}"),
    *((latents, {"z.npy": content}, "z.npy", "train", f"z.npy {NOT_WHOLE}")
      for content in (PICKLED, *(itemgetter(slice(size)) for size in (0, 50, -1)))),
    (latents, {"z_labels.npy": PICKLED}, "z.npy", "train", f"z_labels.npy {NOT_WHOLE}"),
    (latents, {"z_labels.npy": None}, "z.npy", "train", r"file .*z_labels.npy is missing"),
    (latents, {"z_test.npy": None}, "z.npy", "test",
     "z.npy has no test split: expected z_test.npy and z_test_labels.npy beside it"),
    (latents, {"z.npy": np.zeros((2, 4), "f4")}, "z.npy", "train",
     r"latents must be \(N, C, H, W\) float16 or float32, got \(2, 4\) float32"),
    (latents, {"z.npy": GREY}, "z.npy", "train", "float16 or float32, got .* uint8"),
    (latents, {"z.npy": LATENTS[:0], "z_labels.npy": np.zeros(0, int)}, "z.npy", "train",
     r"are empty: shape \(0, 4, 2, 2\)"),
    *((cifar, {"data_batch_4.bin": bytes(size)}, "", "train", f"{TRUNCATED} {size}")
      for size in (0, 3072, 3074)),
    (cifar, {"data_batch_3.bin": bytes([10] * 3073)}, "", "train",
     r"labels must be in \[0, 10\), got 10"),
    (cifar, {"data_batch_5.bin": None}, "", "train", r"file .*data_batch_5.bin is missing"),
    (None, {"a/0.png": "RGB"}, "", "test", "no test split: expected a folder test or val inside"),
    (None, {"test/a/0.png": "RGB"}, "", "train", "no train split: expected a folder train inside"),
    (None, {"train/a/0.png": "RGB", "test/b/0.png": "RGB"}, "", "test",
     r"test/b is not a class of the train split: \['a'\]"),
    (None, {}, "", "train", "has no data: expected CIFAR's .bin files, IDX files or one"),
    (None, {"a/notes.txt": b""}, "", "train", r"class folder .*a is empty: expected images"),
    *((None, {"a/0.png": mode}, "", "train",
       f"0.png must be a grey or RGB image, got mode {mode}") for mode in ("RGBA", "LA", "I;16")),
    (None, {"a/0.png": see_through()}, "", "train", "0.png must be opaque, got a transparent col"),
    (None, {"a/0.png": png(4, 16)}, "", "train", "0.png must have 8 bits a channel, got 16"),
    (None, {"a/0.png": png(20_000, 8)}, "", "train", "0.png cannot be decoded: Image size"),
    (None, {}, "missing.npz", "train", r"data source .*missing.npz does not exist"),
    (None, {"a.csv": b"1,2"}, "a.csv", "train", r"unknown format a.csv: expected a folder"),
    (npz, {}, "a.npz", "val", "split must be one of train, test, got val"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "files", "name", "split", "message"), BROKEN, ids=[row[-1] for row in BROKEN]
)
def test_rejects_a_source_and_says_why(tmp_path, whole, files, name, split, message):
    if whole:
        whole(tmp_path)
    write(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / name, split)


PACKED = "train-images-idx3-ubyte.gz"
NO_IDX = "is no whole IDX file of bytes: "


@pytest.mark.parametrize(
    ("name", "change", "split", "message"),
    [
        (PACKED, lambda data: b"", "train", NO_IDX),
        (PACKED, lambda data: data[:-9], "train", f"{NO_IDX}Compressed file ended"),
        (PACKED, lambda data: b"none", "train", f"{NO_IDX}Not a gzipped file"),
        (PACKED, lambda data: gzip.compress(idx_bytes(GREY)), "train", "expected 3 dimensions"),
        ("train-images-idx3-ubyte", lambda data: idx_bytes(GREY[0])[:-1], "train", "got 63$"),
        ("train-images-idx3-ubyte", lambda data: idx_bytes(GREY[0]) + b"0", "train", "got more$"),
        ("train-images-idx3-ubyte", lambda data: b"\0\0\x0d\3", "train", r"got \(0, 13, 3\)"),
        ("train-images-idx3-ubyte", lambda data: b"\0\0", "train", NO_IDX),
        ("train-labels-idx1-ubyte.gz", None, "train", "and no labels of that split beside it"),
        (
            "train-labels-idx1-ubyte.gz",
            lambda data: gzip.compress(idx_bytes(np.zeros(2, np.uint8))),
            "train",
            "one label per train image: 3 images, 2 labels",
        ),
        ("t10k-images-idx3-ubyte.gz", None, "test", "no test split: expected t10k-images-idx3-uby"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path, name, change, split, message):
    idx(tmp_path, packed=True)
    path = tmp_path / name
    path.unlink(missing_ok=True) if change is None else path.write_bytes(
        change(path.read_bytes() if path.exists() else b"")
    )
    with pytest.raises(ValueError, match=message) as raised:
        open_data(tmp_path, split)
    assert isinstance(raised.value, formats.MissingSplit) == (split == "test")


def test_packed_images_are_held_up_to_a_size(tmp_path, monkeypatch):
    idx(tmp_path, packed=True)
    monkeypatch.setattr(idx_module, "MAX_COMPRESSED_BYTES", 3 * 7 * 6 - 1)
    with pytest.raises(ValueError, match=r"126 bytes are packed: unpack it, to be read from disk"):
        open_data(tmp_path)
