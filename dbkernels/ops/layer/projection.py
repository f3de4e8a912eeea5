"""Linear projections of tokens, and sums of their weights' gradients over chunks of tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.backend.dry_run_device import runs_as_on_gpu

CPU_CHUNK = 1024  # tokens whose operands a CPU holds in float32 beside them


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x W^T + b, from (..., D_in) to (..., D_out), into out (tokens, D_out) where it is given."""
    rows = as_rows(x)
    if bias is None:
        y = torch.mm(rows, weight.T, out=out)
    else:
        y = torch.addmm(bias, rows, weight.T, out=out)
    return y.view(*x.shape[:-1], len(weight))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (tokens, D)."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; an empty one where there are none, so that sums are zeros."""
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


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
        self.sums: dict[str, Tensor] = {}

    def add_projection(self, name: str, dy: Tensor, x: Tensor) -> None:
        """The weight's and the bias's gradient of y = x W^T + b."""
        self.add_weight(name, dy, x)
        self.add_bias(name, dy)

    def add_weight(self, name: str, dy: Tensor, x: Tensor, *, part: bool = False) -> None:
        """The weight's gradient, or the part of it that a chunk of tokens gives."""
        name = f"{name}_weight"
        if name not in self.wanted:
            return
        left, right = as_rows(dy).T, as_rows(x)
        if not (part or self.parts):
            self.add(name, product(left, right, sum_dtype(dy, self.dtype)))
        elif name in self.sums:
            add_product(self.sums[name], left, right)
        else:
            self.sums[name] = product(left, right, statistics_dtype(x))

    def add_bias(self, name: str, dy: Tensor) -> None:
        if f"{name}_bias" in self.wanted:
            self.add(f"{name}_bias", as_rows(dy).sum(0, dtype=sum_dtype(dy, self.dtype)))

    def add(self, name: str, value: Tensor) -> None:
        """Add a part, in float32 where there is more than one."""
        total = self.sums.get(name)
        if total is not None:
            value = total.to(torch.promote_types(total.dtype, torch.float32)).add_(value)
        self.sums[name] = value


def sum_dtype(operand: Tensor, wanted: torch.dtype) -> torch.dtype:
    """Of a product or a sum that is cast next: a GPU has it in float32 at once, unrounded."""
    return wanted if wanted == torch.float32 and runs_as_on_gpu(operand) else operand.dtype


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in their dtype or, where it is narrower, in float32."""
    out = left.new_empty((len(left), right.shape[1]), dtype=dtype)
    write_product(out, left, right)
    return out


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, as `product` of the dtype of out."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif runs_as_on_gpu(left):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        add_product(out.zero_(), left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, never rounded to less than the total's float32 on the way."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif runs_as_on_gpu(left):
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:  # a CPU's matmul has no other result than its operands'
        for rows in chunks(len(right), CPU_CHUNK):
            total.addmm_(left[:, rows].to(total.dtype), right[rows].to(total.dtype))
