"""A linear head and the cross-entropy of its logits, of which a chunk of tokens exists at a time.

    logits = x W^T + b,    nll[n] = log(sum_v exp(logits[n, v])) - logits[n, target[n]]
    loss   = sum_n w[n] * nll[n]

Wijmans et al. 2024 (arXiv:2411.09009) and Hsu et al. 2024 (arXiv:2410.10989). A kernel writes the
gradient of a chunk over its logits, with the peak and the sum of a row in one pass over it, as in
Milakov & Gimelshein 2018 (arXiv:1805.02867):

    g[n] = w[n] * (softmax(logits[n]) - one_hot(target[n]))
    dx   = g W,    dW = g^T x,    db = sum_n g[n]

so a forward whose sum has one number as its upstream gradient computes them at once, and its
backward multiplies them by that number. Losses of single tokens have a vector instead, so their
backward computes the logits of each chunk again.

Rows of logits are padded to S columns, so that each begins on a line of memory; columns past V mean
nothing.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops import activations
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import (
    compute_dtype,
    dtypes_as_they_are,
    is_last_to_read,
    register,
)
from dbkernels.ops.layer.gradients import add_product
from dbkernels.ops.layer.tensors import chunks

SHARE = 16  # of the logits is a chunk; of what eager holds, which is three times the logits, 48
ENOUGH = 4096  # tokens, at which reading and writing the sums costs little beside the matmuls
TILE = 128  # tokens, of which a matmul's tiles are full
LINE = 64  # elements: 128 bytes of bfloat16
MAX_BLOCK = 8192  # columns of a tile
ELEMENTS = 1024  # of a tile to each warp: enough loads in flight to hide their latency
# below every logit, and unlike -inf it can be subtracted from itself
_LOWEST = tl.constexpr(-3.4e38)

# kernels


@triton.jit
def _load_logits(logits_ptr, start, V, S, BLOCK_V: tl.constexpr):
    """Columns (BLOCK_V,) and their logits in float32, -inf past V."""
    cols = start + tl.arange(0, BLOCK_V)
    # S is a multiple of a line and V is not, so only this mask leaves the access whole
    x = tl.load(logits_ptr + cols, mask=cols < S, other=0.0).to(tl.float32)
    return cols, tl.where(cols < V, x, float("-inf"))


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, scale_ptr,  # (N, S), (N,), (N,)
    nll_ptr,                            # (N,)
    V, S, ignore_index,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * S
    target = tl.load(target_ptr + row)
    ignored, known = target == ignore_index, (target >= 0) & (target < V)

    peak = tl.full((), _LOWEST, tl.float32)
    total, x_target = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols, x = _load_logits(logits_ptr, start, V, S, BLOCK_V)
        # a load of this one logit could come after another thread's store
        x_target += tl.sum(tl.where(cols == target, x, 0.0), axis=0)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    total = tl.where(known | ignored, total, float("nan"))
    tl.store(nll_ptr + row, tl.where(ignored, 0.0, tl.log(total) - (x_target - peak)))

    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row)
        for start in range(0, V, BLOCK_V):
            cols, x = _load_logits(logits_ptr, start, V, S, BLOCK_V)
            dx = tl.exp(x - peak) * (scale / total)
            dx = tl.where(cols == target, dx - scale, dx)
            tl.store(logits_ptr + cols, dx, mask=cols < S)


# launchers: they write into tensors of their caller


def _gradient_triton(logits, target, scale, nll, V, ignore_index):
    N, S = logits.shape
    BLOCK_V = min(triton.next_power_of_2(S), MAX_BLOCK)
    num_warps = max(BLOCK_V // ELEMENTS, 1)
    _gradient_kernel[(N,)](
        logits, target, scale, nll, V, S, ignore_index, BLOCK_V=BLOCK_V, num_warps=num_warps
    )


def _gradient_torch(logits, target, scale, nll, V, ignore_index):
    columns = [t if t is None else t[:, None] for t in (target, scale, nll)]
    for padded, t, s, out, wide in activations.chunks(1, logits, *columns):
        rows, x = padded[:, :V], activations.same_dtype(padded, wide)[:, :V]
        if x.dtype != rows.dtype:
            x.copy_(rows)
        ignored, known = t == ignore_index, (t >= 0) & (t < V)
        at = t.where(known, 0)
        peak = x.amax(1, keepdim=True)
        x_target = x.gather(1, at) - peak
        total = x.sub_(peak).exp_().sum(1, keepdim=True)
        total.masked_fill_(~(known | ignored), math.nan)
        out.copy_((total.log() - x_target).masked_fill_(ignored, 0))
        if s is None:
            continue
        x.mul_(s / total)
        x.scatter_(1, at, x.gather(1, at) - s)
        if x.dtype != rows.dtype:
            rows.copy_(x)


def _check_targets(logits, target, scale, nll, V, ignore_index):
    unknown = target[(target != ignore_index) & ((target < 0) | (target >= V))]
    if len(unknown):
        raise ValueError(
            f"target must be 0 to {V - 1}, or ignore_index = {ignore_index}, "
            f"got {unknown[0].item()}"
        )


# Writes nll (N,), and the gradient over logits (N, S) of `empty_logits`. nll and scale are float32,
# with float64 logits float64. The nll of an ignored target is 0, and its scale must be. Without
# scale there is no gradient, and the logits are lost. A target that is neither a column nor ignored
# is a ValueError on a CPU; elsewhere, where to look at it would wait for the device, its nll and
# its row's gradient are NaN
_gradient_op = register(
    "softmax_gradient(Tensor(a!) logits, Tensor target, Tensor? scale, Tensor(b!) nll,"
    " SymInt V, int ignore_index) -> ()",
    triton=_gradient_triton,
    torch_=_gradient_torch,
    check=_check_targets,
)


# allocation and autograd


def empty_logits(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, S), of which the logits are the first V columns."""
    return torch.empty((rows, -(-V // LINE) * LINE), dtype=dtype, device=device)


def tokens_per_chunk(tokens: int, V: int, D: int) -> int:
    """A small share of the tokens, but so many that the logits are no less than dx, which exists
    as a whole anyway.
    """
    size = max(min(tokens // SHARE, ENOUGH), tokens * D // V, 1)
    return triton.cdiv(size, TILE) * TILE


class Head(NamedTuple):
    """What the loss is told beside its tensors."""

    dtype: torch.dtype  # of the matmuls
    ignore_index: int
    wanted: frozenset[str]  # names of the tensors that want a gradient


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, head: Head
) -> tuple[Tensor, list[Tensor | None]]:
    """nll (N,), and the gradients of sum_n scale[n] * nll[n] that are wanted, from x (N, D).

    That of x is as its matmul gives it, those of weight and bias are sums in float32 at least.
    """
    dx = torch.empty_like(x, dtype=head.dtype) if "x" in head.wanted else None
    dweight = x.new_zeros(weight.shape, dtype=scale.dtype) if "weight" in head.wanted else None
    dbias = x.new_zeros(len(weight), dtype=scale.dtype) if "bias" in head.wanted else None
    weight = weight.to(head.dtype)
    bias = None if bias is None else bias.to(head.dtype)
    V, D = weight.shape
    size = tokens_per_chunk(len(x), V, D)
    buffer = empty_logits(min(size, len(x)), V, head.dtype, x.device)
    nll = torch.empty_like(scale)
    for chunk in chunks(len(x), size):
        x_chunk = x[chunk].to(head.dtype)
        padded = buffer[: len(x_chunk)]
        g = padded[:, :V]
        # the logits until then, rounded once with a bias too; a compiler takes no out= with padding
        # between its rows
        if bias is not None:
            g.copy_(bias)
        g.addmm_(x_chunk, weight.T, beta=0 if bias is None else 1)
        scales = scale[chunk] if head.wanted else None
        _gradient_op(padded, target[chunk], scales, nll[chunk], V, head.ignore_index)
        if dx is not None:
            torch.mm(g, weight, out=dx[chunk])
        if dweight is not None:
            add_product(dweight, g.T, x_chunk)
        if dbias is not None:
            dbias.add_(g.sum(0, dtype=dbias.dtype))
    return nll, [dx, dweight, dbias]


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, x, weight, bias, target, scale):
        nll, gradients = linear_cross_entropy_forward(x, weight, bias, target, scale, head)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return (scale * nll).sum()

    @staticmethod
    def backward(ctx, dloss):
        checks.refuse_double_backward("linear_cross_entropy")
        gradients = (
            None if gradient is None else _scaled(gradient, dloss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, *gradients, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, head, x, weight, bias, target, scale):
        ctx.save_for_backward(x, weight, bias, target, scale)
        ctx.head = head
        losses_only = head._replace(wanted=frozenset())
        nll, _ = linear_cross_entropy_forward(x, weight, bias, target, scale, losses_only)
        return scale * nll

    @staticmethod
    def backward(ctx, dloss):
        checks.refuse_double_backward("linear_cross_entropy")
        x, weight, bias, target, scale = ctx.saved_tensors
        scale = (scale * dloss).masked_fill_(target == ctx.head.ignore_index, 0)
        with dtypes_as_they_are(x.device.type):
            _, gradients = linear_cross_entropy_forward(x, weight, bias, target, scale, ctx.head)
        given = zip(gradients, (x, weight, bias), strict=True)
        return None, *(None if g is None else g.to(t.dtype) for g, t in given), None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Their product, in the gradient's own memory if it may."""
    # the factor in the gradient's own dtype would be rounded, in float16 even to 0
    wide = gradient.to(factor.dtype)
    return wide.mul_(factor) if wide is not gradient or is_last_to_read() else wide * factor


# public


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the logits x W^T + b, which never exist as a whole.

    The matmuls run in the dtype of the weight, or in autocast's. The gradients of "mean" and "sum"
    are computed with the loss, those of "none" in the backward, from logits computed again.

    Args:
        x:             (..., D)  float32, bfloat16 or float16, on a CPU also float64
        weight:        (V, D)    of any of these dtypes
        target:        (...)     int64, each 0 to V - 1 or ignore_index. On a GPU another one is not
                       an error, which would wait for the device: its loss and gradients are NaN
        bias:          (V,)      of any of these dtypes, or None
        token_weight:  (...)     factor of each token's loss, without a gradient; None is 1
        ignore_index:  a target whose token has a loss of 0 and does not count
        reduction:     "mean" divides the sum by the number of tokens that count, whatever their
                       weights; with no such token it is 0. "none" reduces nothing
    Returns:
        () or, for "none", (...), float32 or, for float64, float64. Softmax and sums are so inside.
    Raises:
        ValueError: a shape, dtype, device or target disagrees, or reduction is unknown.
        RuntimeError: the gradient is differentiated.
    """
    _check(x, weight, target, bias, token_weight, reduction)
    dtype, follows = compute_dtype(x, weight), torch.is_grad_enabled()
    given = {"x": x, "weight": weight, "bias": bias}
    wanted = frozenset(n for n, t in given.items() if follows and t is not None and t.requires_grad)
    head = Head(dtype, ignore_index, wanted)
    targets, wide = target.reshape(-1), torch.promote_types(dtype, torch.float32)
    counted = targets != ignore_index
    weights = torch.ones_like(target) if token_weight is None else token_weight
    scale = weights.to(wide).reshape(-1).masked_fill(~counted, 0)
    tensors = x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, targets.contiguous()
    if reduction == "none":
        return _TokenLosses.apply(head, *tensors, scale).view(target.shape)
    if reduction == "sum":
        return _SummedLoss.apply(head, *tensors, scale)
    count = counted.sum().clamp_min(1).to(wide)
    # a power of two is left for the backward, which then rounds no gradient a second time
    fraction, _ = torch.frexp(count)
    return _SummedLoss.apply(head, *tensors, scale / fraction) * (fraction / count)


def _check(x, weight, target, bias, token_weight, reduction):
    checks.check_reduction(reduction)
    checks.check_floats(x=x, weight=weight, bias=bias, token_weight=token_weight)
    if target.dtype != torch.int64 or target.device != x.device:
        raise ValueError(
            f"target must be int64 on {x.device}, got {target.dtype} on {target.device}"
        )
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.numel():
        raise ValueError(
            "x and weight must be (..., D) and (V, D) with V and D at least 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.check_shape(x.shape[:-1], target=target, token_weight=token_weight)
    checks.check_shape(weight.shape[:1], bias=bias)
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError("token_weight must not require a gradient, got one that does")
