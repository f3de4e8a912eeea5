import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from training.tiny import equal, make_data

from dbkernels.data.dataset import DatasetBatches, as_data
from dbkernels.data.made_up import Field, MadeUpData


class Samples(Dataset):
    """Dicts as they are given."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": 1}])


LIKE = {"image": torch.zeros(1, 2, 3), "label": 0}


def one_by_one(data):
    """The samples of tiny data as a Dataset has them, their labels as numbers."""
    whole = data.batch(torch.arange(len(data)))
    pairs = zip(whole["image"], whole["label"].tolist(), strict=True)
    return Samples(*({"image": image, "label": label} for image, label in pairs))


def test_batches_follow_their_indices_and_are_put_where_they_are_wanted():
    data, put = make_data(), []
    indices = torch.tensor([3, 1, 4, 1])
    batch = as_data(Subset(one_by_one(data), range(5))).batch(
        indices, lambda tensor: put.append(1) or tensor
    )
    assert equal(batch, data.batch(indices)) and len(put) == 2
    assert len(as_data(one_by_one(data))) == len(data)
    # what gives batches is data as it is
    assert as_data(data) is data


def test_arrays_and_numbers_become_tensors_and_an_empty_batch_keeps_its_shape():
    sample = {"a": np.ones((2, 1), np.float16), "n": np.int64(3), "x": 0.5, "b": True}
    data = DatasetBatches(Samples(sample, sample))
    dtypes = {"a": torch.float16, "n": torch.int64, "x": torch.float32, "b": torch.bool}
    for count in (2, 0):
        batch = data.batch(torch.arange(count))
        assert {name: tensor.dtype for name, tensor in batch.items()} == dtypes
        assert batch["a"].shape == (count, 2, 1) and batch["x"].tolist() == [0.5] * count


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "must be map-style, with a length and samples by index, got Stream"),
        (Samples(), "a dataset must have samples, got Samples of 0"),
        (Samples((1, 2)), "sample 0 must be a dict, got tuple; keys names its parts$"),
        (Samples("ab"), "sample 0 must be a dict, got str$"),
        (Samples({"a": np.array(["b"])}), "a of sample 0 must have numbers, got <U1"),
        (DataLoader([LIKE]), "must be map-style, .*, got DataLoader"),
        (Samples({"text": "a"}), "text of sample 0 must be a tensor, .* or a number, got str"),
        (Samples(LIKE, [1]), "sample 1 must be a dict, got list"),
        (
            Samples(LIKE, {"image": torch.zeros(1, 2, 3)}),
            r"sample 1 must have .*'label': '\(\) torch.int64'} as sample 0, got .*float32'}$",
        ),
        (
            Samples(LIKE, LIKE | {"image": torch.zeros(1, 3, 2)}),
            r"must have {'image': '\(1, 2, 3\) .* as sample 0, got {'image': '\(1, 3, 2\) ",
        ),
        (Samples(LIKE, LIKE | {"label": 0.0}), "sample 1 .*int64'} as sample 0, got .*float32'}$"),
        (Samples(LIKE), r"must be in \[0, 1\), got 1"),
    ],
)
def test_rejects_what_cannot_be_stacked_and_says_what_came(dataset, message):
    with pytest.raises(ValueError, match=message):
        DatasetBatches(dataset).batch(torch.tensor([1]))


def test_keys_name_the_parts_of_a_tuple_and_choose_those_of_a_dict():
    image, label = torch.rand(2, 1, 2, 3), [4, 5]
    expected = {"image": image, "label": torch.tensor(label)}
    pairs = Samples(*zip(image, label, strict=True))
    dicts = Samples(*({"text": "a", "label": n, "image": i} for i, n in pairs.samples))
    for dataset in (pairs, Samples(*map(list, pairs.samples)), dicts):
        data = as_data(dataset, keys=["image", "label"])
        batch = data.batch(torch.arange(2))
        assert equal(batch, expected) and list(batch) == ["image", "label"]


@pytest.mark.parametrize(
    ("dataset", "keys", "message"),
    [
        (Samples((1, 2, 3)), ("a", "b"), "sample 0 must have the parts a, b, got 3"),
        (Samples((1,), 2), ("a",), "sample 1 must be a dict, got int$"),
        (Samples({"a": 1, "c": 2}), ("a", "b"), "sample 0 must have b, got a, c"),
        (Samples((1, 2)), ("a", "a"), "keys must be names, each once, got .'a', 'a'."),
        (Samples((1, 2)), "ab", "keys must be names, each once, got 'ab'"),
        (Samples((1, 2)), (), "keys must be names, each once, got"),
        (Samples((1, 2)), (0, 1), "keys must be names, each once, got"),
        (make_data(), ("a",), "keys must be None for ImageData, which names its parts itself, got"),
    ],
)
def test_rejects_keys_that_do_not_fit(dataset, keys, message):
    with pytest.raises(ValueError, match=message):
        as_data(dataset, keys=keys).batch(torch.tensor([1]))


def test_a_data_set_with_a_batch_of_its_own_is_a_data_set():
    class Cuts(Samples):
        def batch(self, batch_size, drop_last_batch=False):
            raise AssertionError

    assert len(as_data(Cuts(LIKE, LIKE)).batch(torch.tensor([1, 0]))["label"]) == 2


def test_made_up_samples_have_the_fields_that_are_asked_and_are_the_same_every_time():
    fields = {"image": Field((3, 4, 5), torch.float32), "label": Field((), torch.int64, 10)}
    data, puts = MadeUpData(fields, 700), []
    batch = data.batch(torch.arange(600), lambda tensor: puts.append(tensor) or tensor)
    assert len(data) == 700 and len(puts) == 2
    assert batch["image"].shape == (600, 3, 4, 5) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (600,) and batch["label"].dtype == torch.int64
    assert batch["label"].min() == 0 and batch["label"].max() == 9
    assert abs(batch["image"].std().item() - 1) < 0.02
    assert equal(data.batch(torch.arange(100, 700)), batch)
