"""Made-up samples of any shape, where there is no data and numbers do not matter."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.data.images import Batch, Put


class Field(NamedTuple):
    """What a sample holds under one name.

    shape:   of one sample
    dtype:   of normal numbers; of integers where they are bounded
    bound:   integers are 0 to bound - 1
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    bound: int = 0

    def made(self, count: int, random: torch.Generator) -> Tensor:
        """(count, *shape)."""
        shape = (count, *self.shape)
        if self.bound:
            return torch.randint(self.bound, shape, dtype=self.dtype, generator=random)
        return torch.randn(shape, dtype=self.dtype, generator=random)


@dataclass(frozen=True)
class MadeUpData:
    """Samples of unit variance; every batch of one size is the same, whatever is asked for.

    Args:
        fields:  of a sample, by name
        count:   number of samples
    """

    fields: dict[str, Field]
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, put: Put = lambda tensor: tensor) -> Batch:
        """As `Data.batch`."""
        random = torch.Generator().manual_seed(0)
        return {name: put(f.made(len(indices), random)) for name, f in self.fields.items()}
