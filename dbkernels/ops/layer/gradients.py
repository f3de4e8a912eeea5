"""Gradients of a layer's weights: sums over chunks of tokens, in float32 where there are several.

dW = dy^T x,    db = sum dy,    dA = (s dy B)^T x,    dB = dy^T (s x A^T)

Those of adapters, which are small, are float32 sums in any case.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.layer.linear import Adapter, adapter_names, as_rows
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.tensors import chunks

SHARED = ("q_weight", "k_weight")  # by all heads, of which each rank has some
CPU_CHUNK = 1024  # tokens whose operands a CPU holds in float32 beside them


class Gradients:
    """Gradients of the weights that are wanted, by name, each a sum over all tokens.

    Args:
        wanted:    names of `LayerWeights.names`
        dtype:     of the parameters, but for the adapters'
        adapters:  of the layer, in the dtype of the branches
    """

    def __init__(
        self, wanted: frozenset[str], dtype: torch.dtype, adapters: Sequence[Adapter] = ()
    ):
        self.wanted = wanted
        self.dtype = dtype
        names = iter(adapter_names(adapters))
        self._adapters = [(next(names), next(names), adapter) for adapter in adapters]
        self.parts = False  # whether all of it comes in parts, of some samples each
        self.second: Gradients | None = None  # of a second attention's weights
        self.sums: dict[str, Tensor] = {}

    def in_parts(self, parts: bool) -> None:
        """Whether what comes next is of some samples alone."""
        self.parts = parts
        if self.second is not None:
            self.second.in_parts(parts)

    def add_weight(self, name: str, dy: Tensor, x: Tensor, *, part: bool = False) -> None:
        """The weight's and its adapters' gradients, or the part that a chunk of tokens gives."""
        self.add_adapters(name, dy, x)
        name, left, right = f"{name}_weight", as_rows(dy).T, as_rows(x)
        if name in self.sums:
            add_product(self.sums[name], left, right)
        elif name in self.wanted:
            dtype = checks.statistics_dtype(x) if part or self.parts else sum_dtype(dy, self.dtype)
            self.sums[name] = product(left, right, dtype)

    def add_adapters(self, name: str, dy: Tensor, x: Tensor, *, start: int = 0) -> None:
        """Those of a projection's adapters, of its outputs from `start` on."""
        dy, x = as_rows(dy), as_rows(x)
        for down, up, whole in self._adapters:
            adapter = whole.rows(start, start + dy.shape[1])
            if whole.projection != name or adapter is None:
                continue
            if up in self.wanted:
                first = start + adapter.start - whole.start
                total = self._total(up, whole.up)[first : first + len(adapter.up)]
                add_product(total, adapter.seen(dy).T, adapter.narrow(x))
            if down in self.wanted:
                add_product(self._total(down, whole.down), adapter.narrow_back(dy).T, x)

    def _total(self, name: str, like: Tensor) -> Tensor:
        """The sum of a small gradient so far, to which a part is added in place."""
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(like, dtype=checks.statistics_dtype(like))
        return self.sums[name]

    def results(self, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
        """By name, the adapters' last, which have dtypes of their own; None is not wanted."""
        found = [self.sums.get(name) for name in names]
        first = len(found) - len(dtypes)
        small = [
            grad if grad is None else grad.to(dtype)
            for grad, dtype in zip(found[first:], dtypes, strict=True)
        ]
        return [*cast(found[:first], self.dtype), *small]

    def add_up(self, ranks: Ranks | None) -> None:
        """Once all else is there, those of what ranks that share a layer have in common."""
        names = [name for name in SHARED if name in self.sums]
        if ranks is not None and names:
            total = torch.stack([self.sums[name] for name in names])
            ranks.sum(total)
            self.sums.update(zip(names, total, strict=True))

    def wants(self, name: str) -> bool:
        """Whether a projection's weight or an adapter of it is to have a gradient."""
        adapters = (a for a in self._adapters if a[2].projection == name)
        return f"{name}_weight" in self.wanted or any(
            which in self.wanted for a in adapters for which in a[:2]
        )

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


def is_quantized(t: Tensor) -> bool:
    """Whether a tensor holds fewer bits than its dtype says, as torchao's do."""
    widens = getattr(type(t), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    return widens and is_traceable_wrapper_subclass(t)


def wide(t: Tensor | None) -> Tensor | None:
    """A tensor of all the bits of its dtype: itself if it is one."""
    return t.dequantize() if t is not None and is_quantized(t) else t


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in a dtype, in their order: themselves where they have it, else copies.

    On a GPU torch._foreach_copy_ takes all pairs to its multi-tensor kernel if the sources have one
    dtype, and each copy has the strides of its source and no holes; else it copies one by one,
    which costs launches and no bits. So sources go by dtype, and copies are made in their layout.

    Weights of fewer bits are made wide, by copies that nobody else has.
    """
    tensors = [wide(t) for t in tensors]
    found = [
        t if t is None or t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in tensors
    ]
    pairs = [(copy, t) for copy, t in zip(found, tensors, strict=True) if copy is not t]
    for source in dict.fromkeys(t.dtype for _, t in pairs):
        of_one_dtype = [pair for pair in pairs if pair[1].dtype == source]
        torch._foreach_copy_(*map(list, zip(*of_one_dtype, strict=True)))
    return found
