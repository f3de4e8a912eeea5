import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset
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
        (Samples((1, 2)), "sample 0 must be a dict, got tuple"),
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
