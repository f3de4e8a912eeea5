import numpy as np
import pytest
import torch
from PIL import Image

from dbkernels.data.images import open_data


def write(path, mode="RGB", size=(6, 4), value=0):
    """One image of `size` (W, H), its pixels distinct and set apart by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = (value + np.arange(np.prod(shape)) % 100).astype(np.uint8).reshape(shape)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def everything(data):
    return data.batch(torch.arange(len(data)))


def test_folders_are_the_classes_and_both_are_sorted_by_name(tmp_path):
    names = ["train/b/2.png", "train/b/10.png", "train/a/z.png", "train/c/0.bmp", "test/a/0.png"]
    written = {name: write(tmp_path / name, value=20 * i) for i, name in enumerate(names)}
    data = open_data(str(tmp_path))
    assert data.num_classes == 3 and data.image_shape == (3, 4, 6) and len(data) == 4
    batch = everything(data)
    assert batch["label"].tolist() == [0, 1, 1, 2]
    order = ["train/a/z.png", "train/b/10.png", "train/b/2.png", "train/c/0.bmp"]
    expected = torch.from_numpy(np.stack([written[name] for name in order]))
    expected = expected.permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(batch["image"], expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_held_out_labels_follow_the_training_classes(tmp_path, held_out):
    for name in ("a", "b", "c"):
        write(tmp_path / f"train/{name}/0.png")
    write(tmp_path / f"{held_out}/c/0.png")
    data = open_data(str(tmp_path), "test")
    assert data.labels.tolist() == [2] and data.num_classes == 3


def test_test_folder_comes_before_val(tmp_path):
    for name, count in [("train", 1), ("val", 2), ("test", 3)]:
        for index in range(count):
            write(tmp_path / f"{name}/a/{index}.png")
    assert len(open_data(str(tmp_path), "test")) == 3


def test_class_folders_alone_are_the_train_split(tmp_path):
    write(tmp_path / "a/0.png")
    write(tmp_path / "b/0.png")
    assert open_data(str(tmp_path)).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no test split: expected a folder test or val inside"):
        open_data(str(tmp_path), "test")


def test_a_test_folder_alone_is_no_train_split(tmp_path):
    write(tmp_path / "test/a/0.png")
    assert len(open_data(str(tmp_path), "test")) == 1
    with pytest.raises(ValueError, match="no train split: expected a folder train inside"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp"])
def test_reads_every_suffix(tmp_path, suffix):
    write(tmp_path / f"a/0.{suffix}")
    assert everything(open_data(str(tmp_path)))["image"].shape == (1, 3, 4, 6)


def test_ignores_what_are_not_images(tmp_path):
    write(tmp_path / "a/0.png")
    for name in ("a/notes.txt", "a/._0.png", ".cache/0.png", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not an image")
    data = open_data(str(tmp_path))
    assert len(data) == 1 and data.num_classes == 1


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "1", "L"), 1), (("RGB", "P", "RGB"), 3), (("P", "RGB"), 3)]
)
def test_modes_of_one_family_mix(tmp_path, modes, channels):
    for index, mode in enumerate(modes):
        write(tmp_path / f"a/{index}.png", mode)
    image = everything(open_data(str(tmp_path)))["image"]
    assert image.shape == (len(modes), channels, 4, 6)


def test_grey_pixels_keep_their_place(tmp_path):
    pixels = write(tmp_path / "a/0.png", "L")
    image = everything(open_data(str(tmp_path)))["image"]
    expected = torch.from_numpy(pixels).double() / 127.5 - 1
    torch.testing.assert_close(image[0, 0], expected.float(), atol=1e-6, rtol=0)


def test_images_are_decoded_when_they_are_drawn(tmp_path):
    write(tmp_path / "a/0.png")
    write(tmp_path / "a/1.png")
    data = open_data(str(tmp_path))
    (tmp_path / "a/1.png").write_bytes(b"broken since")
    data.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"1.png cannot be decoded"):
        data.batch(torch.tensor([1]))


# equal counts of pixels hide a swapped height and width
@pytest.mark.parametrize(
    ("mode", "size", "got"),
    [("RGB", (4, 6), "3, 6, 4"), ("RGB", (6, 5), "3, 5, 6"), ("L", (6, 4), "1, 4, 6")],
)
def test_rejects_image_of_another_shape(tmp_path, mode, size, got):
    write(tmp_path / "a/0.png")
    write(tmp_path / "b/1.png", mode, size)
    data = open_data(str(tmp_path))
    with pytest.raises(ValueError, match=rf"1.png must .* expected \(3, 4, 6\), got \({got}\)"):
        everything(data)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_rejects_modes_that_would_lose_something(tmp_path, mode):
    write(tmp_path / "a/0.png", mode)
    with pytest.raises(ValueError, match=f"0.png must be a grey or RGB image, got mode {mode}"):
        open_data(str(tmp_path))


def test_rejects_truncated_image(tmp_path):
    write(tmp_path / "a/0.png", size=(64, 64))
    write(tmp_path / "a/1.png", size=(64, 64))
    whole = (tmp_path / "a/1.png").read_bytes()
    data = open_data(str(tmp_path))
    for size in (0, 20, len(whole) // 2):
        (tmp_path / "a/1.png").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"1.png cannot be decoded"):
            everything(data)


def test_rejects_image_with_a_broken_chunk(tmp_path):
    write(tmp_path / "a/0.png", size=(64, 64))
    write(tmp_path / "a/1.png", size=(64, 64))
    broken = bytearray((tmp_path / "a/1.png").read_bytes())
    length = broken.index(b"IDAT") - 1  # the last byte of the chunk's length
    broken[length - 1 : length + 1] = b"\0\x20"
    (tmp_path / "a/1.png").write_bytes(broken)
    with pytest.raises(ValueError, match=r"1.png cannot be decoded: broken PNG"):
        everything(open_data(str(tmp_path)))


def test_rejects_class_that_was_not_trained(tmp_path):
    write(tmp_path / "train/a/0.png")
    write(tmp_path / "test/b/0.png")
    with pytest.raises(ValueError, match=r"test/b is not a class of the train split: \['a'\]"):
        open_data(str(tmp_path), "test")


def test_rejects_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no data: expected CIFAR's .bin files or one folder"):
        open_data(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*a is empty: expected images"):
        open_data(str(tmp_path))
