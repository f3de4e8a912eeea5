import numpy as np
import pytest
import torch

from dbkernels.data.cifar import Chain
from dbkernels.data.images import open_data


def pixels(*shape):
    return (np.arange(np.prod(shape)) * 37 % 251).astype(np.uint8).reshape(shape)


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def everything(data):
    return data.batch(torch.arange(len(data)))


def records(count, label_bytes, first_label=0):
    """Records whose pixels differ between samples, channels, rows and columns."""
    samples = pixels(count, label_bytes + 3072)
    samples[:, label_bytes - 1] = np.arange(first_label, first_label + count) % 10
    return samples


def write_cifar_10(folder):
    folder.mkdir(exist_ok=True)
    # batches of different lengths tell a sample's file from its place in the file
    batches = [records(count, 1, count) for count in (2, 1, 3, 1, 4)]
    for index, batch in enumerate(batches, start=1):
        batch.tofile(folder / f"data_batch_{index}.bin")
    records(2, 1, 7).tofile(folder / "test_batch.bin")
    return np.concatenate(batches)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_10_joins_its_batches(tmp_path, inside):
    expected = write_cifar_10(tmp_path / inside)
    data = open_data(str(tmp_path))
    assert all(is_mapped(part) for part in data.images.parts)
    assert data.num_classes == 10 and data.image_shape == (3, 32, 32) and len(data) == 11
    order = torch.tensor([10, 0, 2, 3, 6, 5, 10, 7, 1])
    batch = data.batch(order)
    image = torch.from_numpy(expected[order.numpy(), 1:].reshape(-1, 3, 32, 32) / 127.5 - 1)
    torch.testing.assert_close(batch["image"], image.float(), atol=1e-6, rtol=0)
    assert batch["label"].tolist() == expected[order.numpy(), 0].tolist()
    assert open_data(str(tmp_path), "test").labels.tolist() == [7, 8]


@pytest.mark.parametrize("inside", ["", "cifar-100-binary"])
def test_cifar_100_takes_the_fine_label(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    train = records(3, 2)
    train[:, 0], train[:, 1] = 5, [99, 0, 42]
    train.tofile(tmp_path / inside / "train.bin")
    records(2, 2).tofile(tmp_path / inside / "test.bin")
    assert len(open_data(str(tmp_path), "test")) == 2
    data = open_data(str(tmp_path))
    assert data.labels.tolist() == [99, 0, 42] and data.num_classes == 100
    image = torch.from_numpy(train[:, 2:].reshape(-1, 3, 32, 32) / 127.5 - 1).float()
    torch.testing.assert_close(everything(data)["image"], image, atol=1e-6, rtol=0)


def test_cifar_may_have_its_test_split_alone(tmp_path):
    records(2, 1).tofile(tmp_path / "test_batch.bin")
    assert len(open_data(str(tmp_path), "test")) == 2


def test_rejects_cifar_with_a_label_past_its_classes(tmp_path):
    write_cifar_10(tmp_path)
    batch = records(1, 1)
    batch[0, 0] = 10
    batch.tofile(tmp_path / "data_batch_3.bin")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\), got 10"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("size", [0, 3072, 3073 + 1])
def test_rejects_truncated_cifar(tmp_path, size):
    write_cifar_10(tmp_path)
    (tmp_path / "data_batch_4.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"batch_4.bin is truncated: .* 3073 bytes, got {size}"):
        open_data(str(tmp_path))


def test_rejects_cifar_without_one_of_its_files(tmp_path):
    write_cifar_10(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    with pytest.raises(ValueError, match=r"file .*data_batch_5.bin is missing"):
        open_data(str(tmp_path))
    assert len(open_data(str(tmp_path), "test")) == 2


def test_chain_of_parts_is_their_concatenation():
    parts = [pixels(2, 3), pixels(1, 3) + 100, pixels(4, 3) + 50]
    rows = np.array([6, 0, 2, 1, 3, 2])
    chain = Chain(parts)
    assert chain.shape == (7, 3) and chain.dtype == np.uint8
    assert np.array_equal(chain[rows], np.concatenate(parts)[rows])
