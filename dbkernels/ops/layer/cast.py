"""Copies of several tensors in another dtype, by one launch.

On a GPU torch._foreach_copy_ takes all pairs to its multi-tensor kernel if the sources have one
dtype, and each copy has the strides of its source and no holes; else it copies one by one, which
costs launches and no bits. So sources go by dtype, and copies are made in the layout of theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in a dtype, in their order: themselves where they have it, else copies."""
    found = [
        t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in tensors
    ]
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for copy, source in zip(found, tensors, strict=True):
        if copy is not source:
            pairs.setdefault(source.dtype, []).append((copy, source))
    for of_one_dtype in pairs.values():
        torch._foreach_copy_(*map(list, zip(*of_one_dtype, strict=True)))
    return found
