"""Linear projections of tokens, and sums of their weights' gradients over chunks of tokens.

y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum dy
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, runs_as_on_gpu
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.tensors import LayerWeights, chunks

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


# queries, keys and values, with a query of every token or of the first samples' first ones alone


class QKV(NamedTuple):
    """One tensor, or two where only n samples' first N tokens have queries; so are gradients."""

    q: Tensor | None
    """(n, N, H d), or None."""
    qkv: Tensor
    """(B, T, 3 H d), or keys and values alone (B, T, 2 H d)."""

    def by_head(self, heads: int) -> list[Tensor]:
        """(n or B, H, N or T, d) each, views."""
        there = [t for t in self if t is not None]
        width = sum(t.shape[-1] for t in there) // 3
        each = (t.view(*t.shape[:2], t.shape[-1] // width, heads, width // heads) for t in there)
        return [view for views in each for view in views.permute(2, 0, 3, 1, 4)]

    def write(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Gradients by head, as `by_head`, which lie token by token: side by side."""
        parts = [t.transpose(1, 2).flatten(0, 1).flatten(1) for t in (dq, dk, dv)]
        if self.q is not None:
            as_rows(self.q).copy_(parts.pop(0))
        torch.cat(parts, dim=1, out=as_rows(self.qkv))

    def whole(self) -> Tensor:
        """(B, T, 3 H d), with zeros for the queries that are not there."""
        if self.q is None:
            return self.qkv
        width = self.q.shape[-1]
        whole = torch.nn.functional.pad(self.qkv, (width, 0))
        self._queried(whole)[..., :width] = self.q
        return whole

    def take(self, whole: Tensor) -> None:
        """What was done to `whole`, done here."""
        if self.q is not None:
            width = self.q.shape[-1]
            self.q.copy_(self._queried(whole)[..., :width])
            self.qkv.copy_(whole[..., width:])

    def _queried(self, t: Tensor) -> Tensor:
        """Those of (B, T, ...) that have a query."""
        n, N, _ = self.q.shape
        return t[:n, :N]

    @classmethod
    def of(cls, y: Tensor, w: LayerWeights, wanted: Wanted) -> "QKV":
        """Of y (B, T, D), with queries of those whose results are wanted."""
        if wanted.is_all:
            return cls(None, project(y, w.qkv_weight, w.qkv_bias))
        (q_weight, kv_weight), (q_bias, kv_bias) = _apart(w.qkv_weight), _apart(w.qkv_bias)
        q = project(wanted.of(y), q_weight, q_bias)
        return cls(q, project(y, kv_weight, kv_bias))

    def backward(self, w: LayerWeights) -> Tensor:
        """dy (B, T, D), where this is the gradient."""
        if self.q is None:
            return project(self.qkv, w.qkv_weight.T)
        q_weight, kv_weight = _apart(w.qkv_weight)
        dy = project(self.qkv, kv_weight.T)
        self._queried(dy).add_(project(self.q, q_weight.T))
        return dy

    def add_to(self, gradients: Gradients, y: Tensor) -> None:
        """Those of the projection's weight and bias, where this is the gradient."""
        if self.q is None:
            gradients.add_weight("qkv", self.qkv, y)
            gradients.add_bias("qkv", self.qkv)
            return
        width = self.q.shape[-1]
        if "qkv_weight" in gradients.wanted:
            # whole from the start: its parts beside it would be the step's highest moment
            total = y.new_empty((3 * width, y.shape[-1]), dtype=checks.statistics_dtype(y))
            of_q, of_kv = total[:width], total[width:]
            queried = self._queried(y).contiguous()
            product(as_rows(self.q).T, as_rows(queried), total.dtype, out=of_q)
            product(as_rows(self.qkv).T, as_rows(y), total.dtype, out=of_kv)
            gradients.add("qkv_weight", total)
        gradients.add_bias("qkv", self.q, self.qkv)


def _apart(parameter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The queries' third of its rows, and the others."""
    return (None, None) if parameter is None else parameter.tensor_split([len(parameter) // 3])


# a linear map of a condition, which keeps no copy of its weight


class _Linear(torch.autograd.Function):
    """Under autocast torch keeps a rounded copy of W for the backward.

    For a condition's projection, with few rows and 6 D columns, that copy is larger than all else
    it keeps; casting again costs little.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return project(*cast([x, weight, bias], dtype))

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("linear")
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        rows, dx, dweight, dbias = as_rows(dy.contiguous()), None, None, None
        with dtypes_as_they_are(dy.device.type):
            read = cast([x if needed[1] else None, weight if needed[0] else None], ctx.dtype)
            if needed[0]:  # the weight's copy dies with its only use
                dx = product(rows, read.pop(), sum_dtype(rows, x.dtype)).to(x.dtype).view(x.shape)
            if needed[1]:
                dtype = weight.dtype
                dweight = product(rows.T, as_rows(read[0]), sum_dtype(rows, dtype)).to(dtype)
            if needed[2]:
                dbias = rows.sum(0, dtype=sum_dtype(rows, ctx.bias_dtype)).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the dtype of the weight or in autocast's.

    Args:
        x:       (..., D_in)     float32, bfloat16 or float16, on a CPU also float64
        weight:  (D_out, D_in)   of any of these dtypes
        bias:    (D_out,)        of any of these dtypes, or None
    Returns:
        (..., D_out).
    Raises:
        ValueError: a shape, dtype or device disagrees.
        RuntimeError: the gradient is differentiated.
    """
    checks.check_floats(x=x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            "x and weight must be (..., D_in) and (D_out, D_in), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.check_shape(weight.shape[:1], bias=bias)
    return _Linear.apply(x.contiguous(), weight, bias, compute_dtype(x, weight))
