"""What `open_data` reads, and the message for each source that it cannot use."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dbkernels.data import formats
from dbkernels.data.cifar import Chain
from dbkernels.data.images import open_data


def pixels(*shape):
    return (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)


GREY = pixels(2, 1, 8, 8)
LATENTS = np.linspace(-7, 7, 3 * 4 * 2 * 2).reshape(3, 4, 2, 2).astype(np.float16)
PICKLED = np.array([{}, {}], dtype=object)


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def everything(data):
    return data.batch(torch.arange(len(data)))


def assert_holds(data, stored, labels):
    """All samples, in order: bytes scaled to [-1, 1], floats as they are."""
    exact = stored / 127.5 - 1 if stored.dtype == np.uint8 else stored
    batch = everything(data)
    assert batch["label"].tolist() == labels
    torch.testing.assert_close(
        batch["image"], torch.from_numpy(np.float32(exact)), atol=1e-6, rtol=0
    )


def save_npz(folder, save=np.savez, **arrays):
    """An .npz of two grey images; an array that is None is left out."""
    arrays = {"images": GREY, "labels": [0, 1]} | arrays
    path = folder / "a.npz"
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def save_latents(folder, latents=LATENTS, labels=(0, 6, 2), stem="z"):
    np.save(folder / f"{stem}.npy", latents, allow_pickle=True)
    if labels is not None:
        np.save(folder / f"{stem}_labels.npy", np.array(labels), allow_pickle=True)
    return folder / "z.npy"


def records(count, label_bytes, labels):
    """CIFAR's records, whose pixels differ between samples, channels, rows and columns."""
    samples = pixels(count, label_bytes + 3072)
    samples[:, label_bytes - 1] = labels
    return samples


def save_cifar_10(folder, inside=""):
    (root := folder / inside).mkdir(exist_ok=True)
    # batches of different lengths tell a sample's file from its place in the file
    batches = [records(n, 1, np.arange(n, 2 * n) % 10) for n in (2, 1, 3, 1, 4)]
    for index, batch in enumerate(batches, start=1):
        batch.tofile(root / f"data_batch_{index}.bin")
    records(2, 1, [7, 8]).tofile(root / "test_batch.bin")
    return np.concatenate(batches)


def save_image(path, mode="RGB", size=(6, 4), value=0):
    """One image of `size` (W, H), its pixels distinct and set apart by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    content = (value + np.arange(np.prod(shape)) % 100).astype(np.uint8).reshape(shape)
    Image.fromarray(content).convert(mode).save(path)
    return content


def save_folder(root, *names):
    for name in names:
        save_image(root / name)
    return root


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


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


# .npz


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["a", "a name that moves the offset of the data"])
def test_an_npz_is_mapped_inside_the_zip(tmp_path, dtype, order, name):
    images = np.asarray(pixels(5, 3, 4, 6).astype(dtype), order=order)
    path = tmp_path / f"{name}.npz"
    np.savez(path, first=np.arange(77), images=images, labels=np.arange(5), last=np.ones(9))
    data = open_data(path)
    assert is_mapped(data.images) and not data.images.flags.writeable
    assert np.array_equal(data.images, images) and data.images.dtype == dtype
    assert data.labels.tolist() == [0, 1, 2, 3, 4] and data.num_classes == 5


def test_a_compressed_npz_is_read_whole_up_to_a_size(tmp_path, monkeypatch):
    images = pixels(5, 3, 4, 6)
    path = save_npz(tmp_path, np.savez_compressed, images=images, labels=np.arange(5))
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", images.size + 128)
    data = open_data(path)
    assert not is_mapped(data.images) and np.array_equal(data.images, images)
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", images.size + 127)
    with pytest.raises(ValueError, match=r"compressed and has 488 bytes.* np.savez, which"):
        open_data(path)


@pytest.mark.parametrize(("last", "num_classes"), [(2, 5), (6, 7)])
def test_the_splits_of_an_npz_keep_apart_but_count_classes_together(tmp_path, last, num_classes):
    train, test = pixels(3, 5, 6, 3), pixels(2, 5, 6, 3)[::-1]
    labels, test_labels = np.array([0, 1, 4], np.uint8), np.array([1, last], np.int16)
    path = save_npz(
        tmp_path, images=train, labels=labels, test_images=test, test_labels=test_labels
    )
    for split, images, expected in (("train", train, [0, 1, 4]), ("test", test, [1, last])):
        data = open_data(str(path), split)
        assert data.num_classes == num_classes
        assert_holds(data, images.transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_found_first_or_last(tmp_path, channels):
    first = pixels(2, channels, 8, 5)
    for images in (first, first.transpose(0, 2, 3, 1)):
        assert np.array_equal(open_data(save_npz(tmp_path, images=images)).images, first)


def test_num_classes_may_be_larger_than_the_labels_show(tmp_path):
    path = save_npz(tmp_path, labels=[0, 3])
    assert open_data(path).num_classes == 4
    assert open_data(str(path), num_classes=4).num_classes == 4
    assert open_data(path, num_classes=1000).num_classes == 1000
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3"):
        open_data(path, num_classes=3)


@pytest.mark.parametrize(
    ("arrays", "split", "message"),
    [
        # both, and neither, could be channels
        ({"images": pixels(2, 3, 8, 1)}, "train", r"only one way to read them, got \(2, 3, 8, 1"),
        ({"images": pixels(2, 4, 4, 4)}, "train", r"only one way to read them, got \(2, "),
        ({"images": pixels(2, 8, 8, 8)}, "train", r"only one way to read them, got \(2, "),
        ({"images": pixels(2, 2, 8, 8)}, "train", r"only one way to read them, got \(2, "),
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
        ({"images": PICKLED}, "train", "images of .*a.npz is not a whole array of numbers"),
        ({"labels": PICKLED}, "train", "labels of .*a.npz is not a whole array of numbers"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rejects_the_arrays_of_an_npz(tmp_path, save, arrays, split, message):
    path = save_npz(tmp_path, save, **arrays)
    with pytest.raises(ValueError, match=message):
        open_data(path, split)


# a member that claims more than it holds would be mapped over its neighbour
@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved[:-1],
        lambda saved: saved + b"0",
        lambda saved: b"no" + saved,
        lambda saved: saved[:6] + b"\x03" + saved[7:],  # a version of the format that has names
        lambda saved: saved.replace(b"'|u1'", b"'|O' ") + bytes(7 * 2 * 8 * 8),
    ],
)
def test_rejects_a_member_that_is_not_a_whole_array(tmp_path, damage):
    saved = io.BytesIO()
    np.save(saved, GREY)
    path = save_npz(tmp_path, images=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images.npy", damage(saved.getvalue()))
    with pytest.raises(ValueError, match=r"images of .*a.npz is not a whole array of numbers"):
        open_data(path)


def test_rejects_a_corrupt_compressed_npz(tmp_path):
    path = save_npz(tmp_path, np.savez_compressed)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"images.npy") + len("images.npy") + 20  # past the extra field
    whole[start] = 0xFF  # no deflated block starts so
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a.npz is not a whole"):
        open_data(path)


# latents and CIFAR


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_mapped_and_leave_as_stored(tmp_path, dtype):
    train = LATENTS.astype(dtype)
    path = save_latents(tmp_path, train, np.array([0, 6, 2], np.uint8))
    # they need no test split to train
    assert len(open_data(path)) == 3
    save_latents(tmp_path, -train[:2], [1, 0], stem="z_test")
    for split, expected, labels in (("train", train, [0, 6, 2]), ("test", -train[:2], [1, 0])):
        data = open_data(path, split)
        assert is_mapped(data.images) and data.num_classes == 7
        assert torch.equal(everything(data)["image"], torch.from_numpy(expected).float())
        assert_holds(data, expected, labels)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_10_joins_its_batches(tmp_path, inside):
    expected = save_cifar_10(tmp_path, inside)
    data = open_data(tmp_path)
    assert all(is_mapped(part) for part in data.images.parts)
    assert data.num_classes == 10 and data.image_shape == (3, 32, 32) and len(data) == 11
    assert_holds(data, expected[:, 1:].reshape(-1, 3, 32, 32), expected[:, 0].tolist())
    assert open_data(tmp_path, "test").labels.tolist() == [7, 8]


@pytest.mark.parametrize("inside", ["", "cifar-100-binary"])
def test_cifar_100_takes_the_fine_label(tmp_path, inside):
    (root := tmp_path / inside).mkdir(exist_ok=True)
    train = records(3, 2, [99, 0, 42])
    train[:, 0] = 5
    train.tofile(root / "train.bin")
    records(2, 2, 0).tofile(root / "test.bin")
    assert len(open_data(tmp_path, "test")) == 2
    data = open_data(tmp_path)
    assert data.num_classes == 100
    assert_holds(data, train[:, 2:].reshape(-1, 3, 32, 32), [99, 0, 42])


def test_cifar_may_have_its_test_split_alone(tmp_path):
    save_cifar_10(tmp_path)
    for batch in tmp_path.glob("data_*"):
        batch.unlink()
    assert len(open_data(tmp_path, "test")) == 2


def test_a_chain_of_parts_is_their_concatenation():
    parts = [pixels(2, 3), pixels(1, 3) + 100, pixels(4, 3) + 50]
    rows = np.array([6, 0, 2, 1, 3, 2, 6])
    chain = Chain(parts)
    assert chain.shape == (7, 3) and chain.dtype == np.uint8
    assert np.array_equal(chain[rows], np.concatenate(parts)[rows])


# folders of images


def test_folders_are_the_classes_and_both_are_sorted_by_name(tmp_path):
    names = ["train/b/2.png", "train/b/10.png", "train/a/z.png", "train/c/0.bmp", "test/a/0.png"]
    saved = {name: save_image(tmp_path / name, value=20 * i) for i, name in enumerate(names)}
    data = open_data(tmp_path)
    assert data.num_classes == 3 and data.image_shape == (3, 4, 6) and len(data) == 4
    order = ["train/a/z.png", "train/b/10.png", "train/b/2.png", "train/c/0.bmp"]
    expected = np.stack([saved[name] for name in order]).transpose(0, 3, 1, 2)
    assert_holds(data, expected, [0, 1, 1, 2])


@pytest.mark.parametrize(
    ("names", "split", "labels", "num_classes"),
    [
        (["train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/0.png"], "test", [2], 3),
        (["train/a/0.png", "train/b/0.png", "train/c/0.png", "val/c/0.png"], "test", [2], 3),
        # test comes before val
        (["train/a/0.png", "val/a/0.png", "test/a/0.png", "test/a/1.png"], "test", [0, 0], 1),
        (["a/0.png", "b/0.png"], "train", [0, 1], 2),
        (["test/a/0.png"], "test", [0], 1),
    ],
)
def test_the_training_classes_number_those_of_a_split(tmp_path, names, split, labels, num_classes):
    data = open_data(save_folder(tmp_path, *names), split)
    assert data.labels.tolist() == labels and data.num_classes == num_classes


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp"])
def test_every_suffix_is_read_and_all_else_ignored(tmp_path, suffix):
    save_image(tmp_path / f"a/0.{suffix}")
    for name in ("a/notes.txt", "a/._0.png", ".cache/0.png", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not an image")
    data = open_data(tmp_path)
    assert everything(data)["image"].shape == (1, 3, 4, 6) and data.num_classes == 1


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "1", "L"), 1), (("RGB", "P", "RGB"), 3), (("P", "RGB"), 3)]
)
def test_modes_of_one_family_mix(tmp_path, modes, channels):
    for index, mode in enumerate(modes):
        save_image(tmp_path / f"a/{index}.png", mode)
    assert everything(open_data(tmp_path))["image"].shape == (len(modes), channels, 4, 6)


def test_grey_pixels_keep_their_place(tmp_path):
    saved = save_image(tmp_path / "a/0.png", "L")
    assert_holds(open_data(tmp_path), saved[None, None], [0])


# equal counts of pixels hide a swapped height and width
@pytest.mark.parametrize(
    ("mode", "size", "got"),
    [("RGB", (4, 6), "3, 6, 4"), ("RGB", (6, 5), "3, 5, 6"), ("L", (6, 4), "1, 4, 6")],
)
def test_rejects_an_image_of_another_shape(tmp_path, mode, size, got):
    save_image(tmp_path / "a/0.png")
    save_image(tmp_path / "b/1.png", mode, size)
    data = open_data(tmp_path)
    with pytest.raises(ValueError, match=rf"1.png must .* expected \(3, 4, 6\), got \({got}\)"):
        everything(data)


def with_a_broken_chunk(whole):
    length = whole.index(b"IDAT") - 1  # the last byte of the chunk's length
    return whole[: length - 1] + b"\0\x20" + whole[length + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "cannot be decoded"),
        (lambda whole: whole[:20], "cannot be decoded"),
        (lambda whole: whole[: len(whole) // 2], "cannot be decoded"),
        (with_a_broken_chunk, "cannot be decoded: broken PNG"),
    ],
)
def test_an_image_is_decoded_when_it_is_drawn(tmp_path, damage, message):
    for name in ("a/0.png", "a/1.png"):
        save_image(tmp_path / name, size=(64, 64))
    data, path = open_data(tmp_path), tmp_path / "a/1.png"
    path.write_bytes(damage(path.read_bytes()))
    data.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=f"1.png {message}"):
        everything(data)


# every other source that cannot be used


def cifar_10_with(name, content):
    def save(folder):
        save_cifar_10(folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        # the other split is as it was
        assert len(open_data(folder, "test")) == 2
        return folder

    return save


def folder_with(*names):
    return lambda folder: save_folder(folder, *names)


def image_of(mode):
    return lambda folder: save_image(folder / "a/0.png", mode) is not None and folder


def written(name, text="1,2"):
    return lambda folder: (folder / name).write_text(text) and folder / name


def empty_class(folder):
    (folder / "a").mkdir()
    return folder


TRUNCATED = r"batch_4.bin is truncated: .* 3073 bytes, got"
NOT_WHOLE = "is not a whole .npy array of numbers"
BROKEN = [
    *((lambda f, size=size: cut(save_npz(f), size), "train", r"a.npz is not a whole .npz file")
      for size in (0, 100, -30)),
    *((lambda f, size=size: cut(save_latents(f), size), "train", f"z.npy {NOT_WHOLE}")
      for size in (0, 50, -1)),
    (lambda f: save_latents(f, PICKLED), "train", f"z.npy {NOT_WHOLE}"),
    (lambda f: save_latents(f, labels=PICKLED), "train", f"z_labels.npy {NOT_WHOLE}"),
    (lambda f: save_latents(f, labels=None), "train", r"file .*z_labels.npy is missing"),
    (save_latents, "test", r"file .*z_test.npy is missing"),
    (lambda f: save_latents(f, np.zeros((2, 4), "f4")), "train",
     r"latents must be \(N, C, H, W\) float16 or float32, got \(2, 4\) float32"),
    (lambda f: save_latents(f, GREY), "train", "float16 or float32, got .* uint8"),
    (lambda f: save_latents(f, LATENTS[:0], np.zeros(0, int)), "train",
     r"are empty: shape \(0, 4, 2, 2\)"),
    *((cifar_10_with("data_batch_4.bin", bytes(size)), "train", f"{TRUNCATED} {size}")
      for size in (0, 3072, 3074)),
    (cifar_10_with("data_batch_3.bin", bytes([10] * 3073)), "train",
     r"labels must be in \[0, 10\), got 10"),
    (cifar_10_with("data_batch_5.bin", None), "train", r"file .*data_batch_5.bin is missing"),
    (folder_with("a/0.png"), "test", "no test split: expected a folder test or val inside"),
    (folder_with("test/a/0.png"), "train", "no train split: expected a folder train inside"),
    (folder_with("train/a/0.png", "test/b/0.png"), "test",
     r"test/b is not a class of the train split: \['a'\]"),
    (folder_with(), "train", "has no data: expected CIFAR's .bin files or one folder"),
    (empty_class, "train", r"class folder .*a is empty: expected images"),
    *((image_of(mode), "train", f"0.png must be a grey or RGB image, got mode {mode}")
      for mode in ("RGBA", "LA", "I;16")),
    (lambda f: f / "missing.npz", "train", r"data source .*missing.npz does not exist"),
    (written("a.csv"), "train", r"unknown format a.csv: expected a folder"),
    (lambda f: "digits", "val", "split must be 'train' or 'test', got 'val'"),
]  # fmt: skip


@pytest.mark.parametrize(("save", "split", "message"), BROKEN, ids=[row[2] for row in BROKEN])
def test_rejects_a_source_and_says_why(tmp_path, save, split, message):
    source = save(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_data(source, split)
