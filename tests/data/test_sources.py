"""What `open_data` reads, and the message for each source that it cannot use."""

import io
import sys
import zipfile
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dbkernels.data import formats
from dbkernels.data.images import open_data


def pixels(*shape):
    return (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)


GREY = pixels(2, 1, 8, 8)
LATENTS = np.linspace(-7, 7, 5 * 4 * 2 * 2).reshape(5, 4, 2, 2).astype(np.float16)
PICKLED = np.array([{}, {}], dtype=object)


def everything(data):
    return data.batch(torch.arange(len(data)))


def save_npz(folder, save=np.savez, **arrays):
    """An .npz of two grey images; an array that is None is left out."""
    arrays = {"images": GREY, "labels": [0, 1]} | arrays
    path = folder / "a.npz"
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def save_latents(folder, latents=LATENTS, labels=(0, 6, 2, 1, 0), stem="z"):
    np.save(folder / f"{stem}.npy", latents, allow_pickle=True)
    if labels is not None:
        np.save(folder / f"{stem}_labels.npy", np.array(labels), allow_pickle=True)
    return folder / "z.npy"


def save_image(path, mode="RGB", size=(6, 4), value=0):
    """One image of `size` (W, H), its pixels distinct and set apart by `value`; as (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (3, *size[::-1]) if mode == "RGB" else size[::-1]
    content = (value + np.arange(np.prod(shape)) % 100).astype(np.uint8).reshape(shape)
    Image.fromarray(np.moveaxis(content, 0, -1) if mode == "RGB" else content).convert(mode).save(
        path
    )
    return content.reshape(-1, *size[::-1])


def folder_of(*names):
    def save(root):
        for name in names:
            save_image(root / name)
        return root

    return save


# each saves a source: where it is, its classes, the files that are mapped, and its samples, of
# which so many train


def npz(folder, name="a", save=np.savez, mapped="*.npz", last=2, dtype=np.uint8, order="C"):
    images, labels = pixels(5, 5, 6, 3).astype(dtype), [0, 1, 4, 1, last]
    train = {"images": np.asarray(images[:3], order=order), "labels": np.uint8(labels[:3])}
    test = {"test_images": images[3:], "test_labels": np.int16(labels[3:])}
    path = folder / f"{name}.npz"
    save(path, first=np.arange(77), **train, **test, last=np.ones(9))
    return str(path), max(labels) + 1, mapped, images.transpose(0, 3, 1, 2), labels, 3


def latents(folder, dtype=np.float16, has_test=True):
    images, labels, count = LATENTS.astype(dtype), [0, 6, 2, 1, 0], 5 if has_test else 3
    if has_test:
        save_latents(folder, images[3:], labels[3:], stem="z_test")
    path = save_latents(folder, images[:3], np.array(labels[:3], np.uint8))
    return path, 7, "z.npy", images[:count], labels[:count], 3


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
    names = [f"train/{name}" for name in ("a/z.png", "b/10.png", "b/2.png", "c/0.bmp")]
    names, images = [*names, "test/a/0.png"], {}
    for name in reversed(names):
        images[name] = save_image(root / name, mode, value=20 * len(images))
    return root, 3, None, np.stack([images[name] for name in names]), [0, 1, 1, 2, 0], 4


@pytest.mark.parametrize(
    ("save", "options"),
    [
        (npz, {}),
        (npz, {"last": 6}),
        (npz, {"name": "a name that moves the offset of the data", "order": "F"}),
        (npz, {"dtype": np.float16}),
        (npz, {"dtype": np.float64, "order": "F"}),
        (npz, {"save": np.savez_compressed, "mapped": None}),
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
    ],
)
def test_a_source_has_its_samples_in_any_order_and_maps_what_it_can(tmp_path, save, options):
    source, num_classes, mapped, stored, labels, train = save(tmp_path, **options)
    splits = {"train": slice(0, train), "test": slice(train, None)}
    opened = {split: open_data(source, split) for split, at in splits.items() if labels[at]}
    maps = Path("/proc/self/maps").read_text()
    files = tmp_path.rglob(mapped) if mapped else ()
    assert all(str(file) in maps for file in files) and (str(tmp_path) in maps) == bool(mapped)
    for split, data in opened.items():
        own, images = labels[splits[split]], stored[splits[split]]
        assert (len(data), data.num_classes) == (len(own), num_classes)
        assert data.image_shape == images.shape[1:]
        rows = [len(own) - 1, *range(len(own)), 0]
        batch, is_pixels = data.batch(torch.tensor(rows)), images.dtype == np.uint8
        assert batch["label"].tolist() == [own[row] for row in rows]
        # bytes are scaled to [-1, 1], floats are as they are
        exact = torch.from_numpy(np.float32(images / 127.5 - 1 if is_pixels else images)[rows])
        torch.testing.assert_close(batch["image"], exact, atol=1e-6 * is_pixels, rtol=0)


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


# what only some formats have


def test_a_compressed_npz_is_read_whole_up_to_a_size(tmp_path, monkeypatch):
    path = save_npz(tmp_path, np.savez_compressed)
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", GREY.size + 128)
    assert np.array_equal(open_data(path).images, GREY)
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", GREY.size + 127)
    with pytest.raises(ValueError, match=r"compressed and has 256 bytes.* np.savez, which"):
        open_data(path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_found_first_or_last(tmp_path, channels):
    first = pixels(2, channels, 8, 5)
    for images in (first, first.transpose(0, 2, 3, 1)):
        found = open_data(save_npz(tmp_path, images=images)).images
        assert np.array_equal(found, first) and not found.flags.writeable


def test_num_classes_may_be_larger_than_the_labels_show(tmp_path):
    path = save_npz(tmp_path, labels=[0, 3])
    for given, found in ((None, 4), (4, 4), (1000, 1000)):
        assert open_data(path, num_classes=given).num_classes == found
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
    ],
)
def test_the_training_classes_number_those_of_a_split(tmp_path, names, split, labels, num_classes):
    data = open_data(folder_of(*names.split())(tmp_path), split)
    assert data.labels.tolist() == labels and data.num_classes == num_classes


@pytest.mark.parametrize(
    ("files", "channels"),
    [
        *(({f"0.{suffix}": "RGB"}, 3) for suffix in ("png", "jpg", "JPEG", "webp", "bmp")),
        ({"0.png": "L", "1.png": "1", "2.png": "L"}, 1),
        ({"0.png": "RGB", "1.png": "P", "2.png": "RGB"}, 3),
        ({"0.png": "P", "1.png": "RGB"}, 3),
    ],
)
def test_suffixes_and_modes_of_one_family_mix_and_all_else_is_ignored(tmp_path, files, channels):
    for name, mode in files.items():
        save_image(tmp_path / "a" / name, mode)
    for name in ("a/notes.txt", "a/._0.png", ".cache/0.png", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not an image")
    data = open_data(tmp_path)
    assert everything(data)["image"].shape == (len(files), channels, 4, 6)
    assert data.num_classes == 1


# sources that cannot be used


def with_a_broken_chunk(image):
    length = image.index(b"IDAT") - 1  # the last byte of the chunk's length
    return image[: length - 1] + b"\0\x20" + image[length + 1 :]


# equal counts of pixels hide a swapped height and width
SHAPE = r"must .* expected \(3, 60, 64\), got"


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        ({"size": (60, 64)}, bytes, rf"{SHAPE} \(3, 64, 60\)"),
        ({"size": (64, 61)}, bytes, rf"{SHAPE} \(3, 61, 64\)"),
        ({"mode": "L"}, bytes, rf"{SHAPE} \(1, 60, 64\)"),
        *(({}, itemgetter(slice(size)), "cannot be decoded") for size in (0, 20, 120)),
        ({}, with_a_broken_chunk, "cannot be decoded: broken PNG"),
    ],
)
def test_an_image_is_refused_when_it_is_drawn(tmp_path, options, damage, message):
    first, path = tmp_path / "a/0.png", tmp_path / "a/1.png"
    save_image(first, size=(64, 60))
    save_image(path, **{"size": (64, 60), **options})
    path.write_bytes(damage(path.read_bytes()))
    data = open_data(tmp_path)
    data.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=f"1.png {message}"):
        everything(data)


def damaged(save, damage):
    def saved(folder):
        path = save(folder)
        path.write_bytes(damage(path.read_bytes()))
        return path

    return saved


def npz_whose_images(damage):
    def save(folder):
        np.save(saved := io.BytesIO(), GREY)
        path = save_npz(folder, images=None)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("images.npy", damage(saved.getvalue()))
        return path

    return save


def with_no_deflated_block(compressed):
    start = compressed.index(b"images.npy") + len("images.npy") + 20  # past the extra field
    return compressed[:start] + b"\xff" + compressed[start + 1 :]


def cifar_with(name, content):
    def save(root):
        cifar(root)
        (root / name).write_bytes(content or b"")
        if content is None:
            (root / name).unlink()
        return root

    return save


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
BROKEN = [
    *((partial(save_npz, save=save, **arrays), split, message)
      for save in (np.savez, np.savez_compressed) for arrays, split, message in ARRAYS),
    *((npz_whose_images(damage), "train", f"images {NOT_NUMBERS}") for damage in MEMBERS),
    (damaged(partial(save_npz, save=np.savez_compressed), with_no_deflated_block), "train",
     f"images {NOT_NUMBERS}"),
    *((damaged(save_npz, itemgetter(slice(size))), "train", "a.npz is not a whole .npz file")
      for size in (0, 100, -30)),
    *((damaged(save_latents, itemgetter(slice(size))), "train", f"z.npy {NOT_WHOLE}")
      for size in (0, 50, -1)),
    (partial(save_latents, latents=PICKLED), "train", f"z.npy {NOT_WHOLE}"),
    (partial(save_latents, labels=PICKLED), "train", f"z_labels.npy {NOT_WHOLE}"),
    (partial(save_latents, labels=None), "train", r"file .*z_labels.npy is missing"),
    (save_latents, "test", r"file .*z_test.npy is missing"),
    (partial(save_latents, latents=np.zeros((2, 4), "f4")), "train",
     r"latents must be \(N, C, H, W\) float16 or float32, got \(2, 4\) float32"),
    (partial(save_latents, latents=GREY), "train", "float16 or float32, got .* uint8"),
    (partial(save_latents, latents=LATENTS[:0], labels=np.zeros(0, int)), "train",
     r"are empty: shape \(0, 4, 2, 2\)"),
    *((cifar_with("data_batch_4.bin", bytes(size)), "train", f"{TRUNCATED} {size}")
      for size in (0, 3072, 3074)),
    (cifar_with("data_batch_3.bin", bytes([10] * 3073)), "train",
     r"labels must be in \[0, 10\), got 10"),
    (cifar_with("data_batch_5.bin", None), "train", r"file .*data_batch_5.bin is missing"),
    (folder_of("a/0.png"), "test", "no test split: expected a folder test or val inside"),
    (folder_of("test/a/0.png"), "train", "no train split: expected a folder train inside"),
    (folder_of("train/a/0.png", "test/b/0.png"), "test",
     r"test/b is not a class of the train split: \['a'\]"),
    (folder_of(), "train", "has no data: expected CIFAR's .bin files or one folder"),
    (lambda root: (root / "a").mkdir() or root, "train",
     r"class folder .*a is empty: expected images"),
    *((lambda root, mode=mode: save_image(root / "a/0.png", mode) is not None and root, "train",
       f"0.png must be a grey or RGB image, got mode {mode}") for mode in ("RGBA", "LA", "I;16")),
    (lambda root: root / "missing.npz", "train", r"data source .*missing.npz does not exist"),
    (lambda root: save_image(root / "a.bmp") is not None and root / "a.bmp", "train",
     r"unknown format a.bmp: expected a folder"),
    (lambda root: "digits", "val", "split must be 'train' or 'test', got 'val'"),
]  # fmt: skip


@pytest.mark.parametrize(("save", "split", "message"), BROKEN, ids=[row[2] for row in BROKEN])
def test_rejects_a_source_and_says_why(tmp_path, save, split, message):
    source = save(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_data(source, split)
