"""Some samples of a data set, spread evenly over all of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbkernels.data.images import Batch, Data, Put, check_indices
from dbkernels.data.rows import spaced


@dataclass(frozen=True, eq=False)
class Spaced:
    """Evenly spaced samples of some data: so many, or all where there are no more."""

    data: Data
    most: int

    def __len__(self) -> int:
        return min(len(self.data), self.most)

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`."""
        chosen = torch.from_numpy(spaced(len(self.data), self.most))
        return self.data.batch(chosen[check_indices(indices, len(self))], put)
