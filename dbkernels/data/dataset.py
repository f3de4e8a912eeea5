"""Samples of any map-style `torch.utils.data.Dataset` of dicts, in batches."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dbkernels.data.images import Batch, Data, Put, check_indices


class DatasetBatches:
    """Batches of a Dataset's samples, each read when it is asked for.

    Args:
        dataset:  has a length, and gives a dict for an index: tensors, arrays or numbers by name;
                  names, shapes and dtypes are those of sample 0 in every one
    Raises:
        ValueError: the dataset is empty, has no length or no samples by index, or its first sample
                    is no such dict.
    """

    def __init__(self, dataset: Dataset):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "a dataset must be map-style, with a length and samples by index, "
                f"got {type(dataset).__name__}"
            )
        if not len(dataset):
            raise ValueError(f"a dataset must have samples, got {type(dataset).__name__} of 0")
        self.dataset = dataset
        self._first = self._read(0)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`.

        Raises:
            ValueError: the indices are malformed, or a sample is not like the first one.
        """
        samples = [self._sample(index) for index in check_indices(indices, len(self)).tolist()]
        if not samples:
            return {name: put(like.new_empty(0, *like.shape)) for name, like in self._first.items()}
        return {name: put(torch.stack([s[name] for s in samples])) for name in self._first}

    def _read(self, index: int) -> Batch:
        sample = self.dataset[index]
        if not isinstance(sample, dict):
            raise ValueError(f"sample {index} must be a dict, got {type(sample).__name__}")
        for name, value in sample.items():
            if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
                raise ValueError(
                    f"{name} of sample {index} must be a tensor, an array or a number, "
                    f"got {type(value).__name__}"
                )
        # Python's floats would else have the dtype that is torch's default at the time
        dtypes = {
            name: torch.float32 if type(value) is float else None for name, value in sample.items()
        }
        return {name: torch.as_tensor(value, dtype=dtypes[name]) for name, value in sample.items()}

    def _sample(self, index: int) -> Batch:
        sample = self._read(index)
        expected, got = (_kinds(each) for each in (self._first, sample))
        if expected != got:
            raise ValueError(f"sample {index} must have {expected} as sample 0, got {got}")
        return sample


def _kinds(sample: Batch) -> dict[str, str]:
    return {name: f"{tuple(sample[name].shape)} {sample[name].dtype}" for name in sorted(sample)}


def as_data(source: Data | Dataset) -> Data:
    """What the trainer reads: the source itself where it gives batches, or those of a Dataset."""
    return source if hasattr(source, "batch") else DatasetBatches(source)
