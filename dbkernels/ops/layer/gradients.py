"""Gradients of a layer's weights: sums over chunks of tokens, in float32 where there are several.

dW = dy^T x,    db = sum dy
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.layer.linear import as_rows
from dbkernels.ops.layer.tensors import chunks

CPU_CHUNK = 1024  # tokens whose operands a CPU holds in float32 beside them


class Gradients:
    """Gradients of the weights that are wanted, by name, each a sum over all tokens.

    Args:
        wanted:  names of `LayerWeights`
        dtype:   of the parameters
    """

    def __init__(self, wanted: frozenset[str], dtype: torch.dtype):
        self.wanted = wanted
        self.dtype = dtype
        self.parts = False  # whether all of it comes in parts, of some samples each
        self.second: Gradients | None = None  # of a second attention's weights
        self.sums: dict[str, Tensor] = {}

    def in_parts(self, parts: bool) -> None:
        """Whether what comes next is of some samples alone."""
        self.parts = parts
        if self.second is not None:
            self.second.in_parts(parts)

    def add_weight(self, name: str, dy: Tensor, x: Tensor, *, part: bool = False) -> None:
        """The weight's gradient, or the part of it that a chunk of tokens gives."""
        name, left, right = f"{name}_weight", as_rows(dy).T, as_rows(x)
        if name in self.sums:
            add_product(self.sums[name], left, right)
        elif name in self.wanted:
            dtype = checks.statistics_dtype(x) if part or self.parts else sum_dtype(dy, self.dtype)
            self.sums[name] = product(left, right, dtype)

    def add_bias(self, name: str, *dy: Tensor) -> None:
        """The bias's gradient, of outputs in one tensor or side by side in several."""
        if f"{name}_bias" in self.wanted:
            sums = [as_rows(t).sum(0, dtype=sum_dtype(t, self.dtype)) for t in dy]
            self.add(f"{name}_bias", torch.cat(sums) if len(sums) > 1 else sums[0])

    def add(self, name: str, value: Tensor) -> None:
        """Add a part if it is wanted, in float32 where there is more than one."""
        if name in self.sums:
            total = self.sums[name]
            value = total.to(checks.statistics_dtype(total)).add_(value)
        if name in self.wanted:
            self.sums[name] = value


def sum_dtype(operand: Tensor, wanted: torch.dtype) -> torch.dtype:
    """Of a product or a sum that is cast next: a GPU has it in float32 at once, unrounded."""
    return wanted if wanted == torch.float32 and runs_as_on_gpu(operand) else operand.dtype


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right in their dtype or, where it is narrower, in float32; into out where given."""
    if out is None:
        out = left.new_empty((len(left), right.shape[1]), dtype=dtype)
    if left.dtype == dtype:
        torch.mm(left, right, out=out)
    elif runs_as_on_gpu(left):
        torch.mm(left, right, out_dtype=dtype, out=out)
    else:
        add_product(out.zero_(), left, right)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, never rounded to less than the total's float32 on the way."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif runs_as_on_gpu(left):
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:  # a CPU's matmul has no other result than its operands'
        for rows in chunks(len(right), CPU_CHUNK):
            total.addmm_(left[:, rows].to(total.dtype), right[rows].to(total.dtype))


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in a dtype, in their order: themselves where they have it, else copies.

    On a GPU torch._foreach_copy_ takes all pairs to its multi-tensor kernel if the sources have one
    dtype, and each copy has the strides of its source and no holes; else it copies one by one,
    which costs launches and no bits. So sources go by dtype, and copies are made in their layout.
    """
    found = [
        t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in tensors
    ]
    pairs = [(copy, t) for copy, t in zip(found, tensors, strict=True) if copy is not t]
    for source in dict.fromkeys(t.dtype for _, t in pairs):
        of_one_dtype = [pair for pair in pairs if pair[1].dtype == source]
        torch._foreach_copy_(*map(list, zip(*of_one_dtype, strict=True)))
    return found
