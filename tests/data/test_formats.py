import io
import zipfile

import numpy as np
import pytest
import torch

from dbkernels.data import formats
from dbkernels.data.formats import read_latents, read_npz
from dbkernels.data.images import open_data


def pixels(*shape):
    return (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)


def is_mapped(array):
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def everything(data):
    return data.batch(torch.arange(len(data)))


# .npz


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["a", "a name that moves the offset of the data"])
def test_npz_is_mapped_inside_the_zip(tmp_path, dtype, order, name):
    images = np.asarray(pixels(5, 3, 4, 6).astype(dtype), order=order)
    path = tmp_path / f"{name}.npz"
    np.savez(path, first=np.arange(77), images=images, labels=np.arange(5), last=np.ones(9))
    arrays = read_npz(path, "train")
    assert is_mapped(arrays.images) and not arrays.images.flags.writeable
    assert np.array_equal(arrays.images, images) and arrays.images.dtype == dtype
    assert arrays.labels.tolist() == [0, 1, 2, 3, 4] and arrays.num_classes == 5


def test_small_compressed_npz_is_read_whole(tmp_path):
    images = pixels(5, 3, 4, 6)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.arange(5))
    arrays = read_npz(tmp_path / "a.npz", "train")
    assert not is_mapped(arrays.images) and np.array_equal(arrays.images, images)


def test_large_compressed_npz_says_how_to_save_it(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=pixels(5, 3, 4, 6), labels=np.arange(5))
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", 5 * 3 * 4 * 6 + 127)
    with pytest.raises(ValueError, match=r"compressed and has 488 bytes.* np.savez, which"):
        read_npz(tmp_path / "a.npz", "train")
    monkeypatch.setattr(formats, "MAX_COMPRESSED_BYTES", 5 * 3 * 4 * 6 + 128)
    read_npz(tmp_path / "a.npz", "train")


@pytest.mark.parametrize(("last", "num_classes"), [(2, 5), (6, 7)])
def test_npz_splits_keep_apart_but_count_classes_together(tmp_path, last, num_classes):
    np.savez(
        tmp_path / "a.npz",
        images=pixels(3, 5, 6, 3),
        labels=np.array([0, 1, 4], np.uint8),
        test_images=pixels(2, 5, 6, 3)[::-1],
        test_labels=np.array([1, last], np.int16),
    )
    train, test = (open_data(str(tmp_path / "a.npz"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    assert train.num_classes == test.num_classes == num_classes
    expected = torch.from_numpy(pixels(2, 5, 6, 3)[::-1].transpose(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(everything(test)["image"], expected.float(), atol=1e-6, rtol=0)
    assert everything(test)["label"].tolist() == [1, last]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_found_first_or_last(tmp_path, channels):
    first = pixels(2, channels, 8, 5)
    for name, images in {"first": first, "last": first.transpose(0, 2, 3, 1)}.items():
        np.savez(tmp_path / f"{name}.npz", images=images, labels=[0, 1])
        assert np.array_equal(read_npz(tmp_path / f"{name}.npz", "train").images, first)


# both, and neither, could be channels
@pytest.mark.parametrize("shape", [(2, 3, 8, 1), (2, 4, 4, 4), (2, 8, 8, 8), (2, 2, 8, 8)])
def test_channels_are_never_guessed(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=pixels(*shape), labels=[0, 1])
    with pytest.raises(ValueError, match=rf"only one way to read them, got \({shape[0]}, "):
        read_npz(tmp_path / "a.npz", "train")


def test_rejects_npz_without_four_dimensions(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2, 8, 8), labels=[0, 1])
    with pytest.raises(ValueError, match=r"must have 4 dimensions, got \(2, 8, 8\)"):
        read_npz(tmp_path / "a.npz", "train")


@pytest.mark.parametrize(
    ("present", "split", "missing"),
    [
        (("labels",), "train", "images"),
        (("images",), "train", "labels"),
        (("images", "labels"), "test", "test_images"),
        (("images", "labels", "test_images"), "test", "test_labels"),
    ],
)
def test_rejects_npz_without_the_split(tmp_path, present, split, missing):
    np.savez(tmp_path / "a.npz", **{name: np.arange(2) for name in present})
    with pytest.raises(ValueError, match=f"has no array {missing} for the {split} split"):
        read_npz(tmp_path / "a.npz", split)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_npz_is_never_unpickled(tmp_path, save, name):
    arrays = {"images": pixels(2, 1, 8, 8), "labels": np.arange(2)}
    save(tmp_path / "a.npz", **arrays | {name: np.array([{}, {}], dtype=object)})
    with pytest.raises(ValueError, match=f"{name} of .*a.npz is not a whole array of numbers"):
        read_npz(tmp_path / "a.npz", "train")


def test_rejects_truncated_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2, 1, 8, 8), labels=[0, 1])
    whole = (tmp_path / "a.npz").read_bytes()
    for size in (0, 100, len(whole) - 30):
        (tmp_path / "a.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.npz is not a whole .npz file"):
            read_npz(tmp_path / "a.npz", "train")


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
def test_rejects_member_that_is_not_a_whole_array(tmp_path, damage):
    saved = io.BytesIO()
    np.save(saved, pixels(2, 1, 8, 8))
    np.savez(tmp_path / "a.npz", labels=[0, 1])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("images.npy", damage(saved.getvalue()))
    with pytest.raises(ValueError, match=r"images of .*a.npz is not a whole array of numbers"):
        read_npz(tmp_path / "a.npz", "train")


def test_rejects_corrupt_compressed_npz(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=pixels(4, 1, 8, 8), labels=[0, 1, 2, 3])
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    start = whole.index(b"images.npy") + len("images.npy") + 20  # past the extra field
    whole[start] = 0xFF  # no deflated block starts so
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"a.npz is not a whole"):
        read_npz(tmp_path / "a.npz", "train")


# latents


def save_latents(folder, split, latents, labels):
    stem = "z_test" if split == "test" else "z"
    np.save(folder / f"{stem}.npy", latents)
    np.save(folder / f"{stem}_labels.npy", labels)
    return folder / "z.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_mapped_and_leave_as_stored(tmp_path, dtype):
    train = np.linspace(-7, 7, 3 * 4 * 2 * 2).reshape(3, 4, 2, 2).astype(dtype)
    save_latents(tmp_path, "test", -train[:2], np.array([1, 0]))
    path = save_latents(tmp_path, "train", train, np.array([0, 6, 2], np.uint8))
    assert is_mapped(read_latents(path, "train").images)
    for split, expected, labels in [("train", train, [0, 6, 2]), ("test", -train[:2], [1, 0])]:
        data = open_data(str(path), split)
        batch = everything(data)
        assert torch.equal(batch["image"], torch.from_numpy(expected).float())
        assert batch["label"].tolist() == labels and data.num_classes == 7


def test_latents_need_no_test_split_to_train(tmp_path):
    path = save_latents(tmp_path, "train", np.zeros((2, 4, 2, 2), np.float16), np.arange(2))
    assert len(open_data(str(path))) == 2
    with pytest.raises(ValueError, match=r"file .*z_test.npy is missing"):
        open_data(str(path), "test")


def test_rejects_latents_without_labels(tmp_path):
    np.save(tmp_path / "z.npy", np.zeros((2, 4, 2, 2), np.float16))
    with pytest.raises(ValueError, match=r"file .*z_labels.npy is missing"):
        open_data(str(tmp_path / "z.npy"))


@pytest.mark.parametrize("shape_dtype", [((2, 4), "float32"), ((2, 4, 2, 2), "uint8")], ids=str)
def test_rejects_what_are_not_latents(tmp_path, shape_dtype):
    path = save_latents(tmp_path, "train", np.zeros(*shape_dtype), np.arange(2))
    with pytest.raises(ValueError, match=f"float16 or float32, got .* {shape_dtype[1]}"):
        open_data(str(path))


def test_rejects_empty_latents(tmp_path):
    path = save_latents(tmp_path, "train", np.zeros((0, 4, 2, 2), "f2"), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match=r"are empty: shape \(0, 4, 2, 2\)"):
        open_data(str(path))


def test_rejects_truncated_latents(tmp_path):
    path = save_latents(tmp_path, "train", np.zeros((2, 4, 2, 2), np.float16), np.arange(2))
    whole = path.read_bytes()
    for size in (0, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"z.npy is not a whole .npy array of numbers"):
            open_data(str(path))


@pytest.mark.parametrize("name", ["z.npy", "z_labels.npy"])
def test_latents_are_never_unpickled(tmp_path, name):
    path = save_latents(tmp_path, "train", np.zeros((2, 4, 2, 2), np.float16), np.arange(2))
    np.save(tmp_path / name, np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{name} is not a whole .npy array of numbers"):
        open_data(str(path))
