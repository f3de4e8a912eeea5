"""Samples of any map-style `torch.utils.data.Dataset`, in batches."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dbkernels.data.images import Batch, Data, Put, check_indices

Keys = Sequence[str]


class DatasetBatches:
    """Batches of a Dataset's samples, each read when it is asked for.

    Args:
        dataset:  has a length, and gives a dict for an index: tensors, arrays or numbers by name;
                  names, shapes and dtypes are those of sample 0 in every one. A sample is a
                  function of its index: what is random belongs into `augment` of the trainer
        keys:     names of the parts of each sample, where it is a tuple or a list; of a dict,
                  those that are taken. None takes a dict as it is
    Raises:
        ValueError: the dataset is empty, has no length or no samples by index, its first sample
                    is no such dict or tuple, or keys are not names, each once.
    """

    def __init__(self, dataset: Dataset, keys: Keys | None = None):
        by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not by_index:
            raise ValueError(
                "a dataset must be map-style, with a length and samples by index, "
                f"got {type(dataset).__name__}"
            )
        if not len(dataset):
            raise ValueError(f"a dataset must have samples, got {type(dataset).__name__} of 0")
        self.dataset, self.keys = dataset, check_keys(keys)
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
        return named_tensors(self.dataset[index], self.keys, f"sample {index}")

    def _sample(self, index: int) -> Batch:
        sample = self._read(index)
        expected, got = (_kinds(each) for each in (self._first, sample))
        if expected != got:
            raise ValueError(f"sample {index} must have {expected} as sample 0, got {got}")
        return sample


def _kinds(sample: Batch) -> dict[str, str]:
    return {name: f"{tuple(sample[name].shape)} {sample[name].dtype}" for name in sorted(sample)}


def check_keys(keys: Keys | None) -> tuple[str, ...] | None:
    """Names of parts as they are given; None where none are.

    Raises:
        ValueError: they are no names, or a name comes twice.
    """
    if keys is None:
        return None
    names = () if isinstance(keys, str) else tuple(keys)
    if not names or len(set(names)) < len(names) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"keys must be names, each once, got {keys!r}")
    return names


def named_tensors(item: object, keys: Keys | None, where: str) -> Batch:
    """The tensors of a sample or of a batch, by name.

    Args:
        item:   a dict of tensors, arrays or numbers; with keys a tuple or a list of them too
        keys:   as for `DatasetBatches`
        where:  names the item, for messages
    Raises:
        ValueError: it is none of these, or has not the parts that keys name.
    """
    if keys is not None and isinstance(item, tuple | list):
        if len(item) != len(keys):
            raise ValueError(f"{where} must have the parts {', '.join(keys)}, got {len(item)}")
        item = dict(zip(keys, item, strict=True))
    if not isinstance(item, Mapping):
        how = "" if keys or not isinstance(item, tuple | list) else "; keys names its parts"
        raise ValueError(f"{where} must be a dict, got {type(item).__name__}{how}")
    if missing := [name for name in keys or () if name not in item]:
        raise ValueError(f"{where} must have {missing[0]}, got {', '.join(map(str, item))}")
    return {name: _tensor(item[name], f"{name} of {where}") for name in keys or item}


def _tensor(value: object, where: str) -> Tensor:
    if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        raise ValueError(
            f"{where} must be a tensor, an array or a number, got {type(value).__name__}"
        )
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        raise ValueError(f"{where} must have numbers, got {value.dtype}")
    # Python's floats would else have the dtype that is torch's default at the time
    return torch.as_tensor(value, dtype=torch.float32 if type(value) is float else None)


def gives_batches(source: object) -> TypeGuard[Data]:
    """Whether it is `Data`. A data set of another library may have a `batch` that cuts it."""
    batch = getattr(source, "batch", None)
    if batch is None or not (hasattr(source, "__getitem__") or hasattr(source, "__iter__")):
        return batch is not None
    return "put" in inspect.signature(batch).parameters


def as_data(source: Data | Dataset | Iterable[object], keys: Keys | None = None) -> Data:
    """What the trainer reads: the source itself where it gives batches, or those of a Dataset.

    Args:
        source:  data, or a Dataset as `DatasetBatches` takes it
        keys:    of a Dataset's samples, likewise
    Raises:
        ValueError: the source is no data, or gives batches and keys name their parts.
    """
    if not gives_batches(source):
        return DatasetBatches(cast(Dataset, source), keys)
    if keys is not None:
        raise ValueError(
            f"keys must be None for {type(source).__name__}, which names its parts itself, "
            f"got {keys!r}"
        )
    return source
