"""A linear head and the cross-entropy of its logits, of which a chunk of tokens exists at a time.

    logits = x W^T + b,    loss = sum_n w[n] * nll[n],    nll of `softmax_gradient`

Wijmans et al. 2024 (arXiv:2411.09009) and Hsu et al. 2024 (arXiv:2410.10989). With the chunk's
gradient in the logits, g[n] = w[n] * (softmax(logits[n]) - one_hot(target[n])), at hand:

    dx = g W,    dW = g^T x,    db = sum_n g[n]

so a forward whose sum has one number as its upstream gradient computes them at once, and its
backward multiplies them by that number. Losses of single tokens have a vector instead, so their
backward computes the logits of each chunk again.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype, dtypes_as_they_are, is_last_to_read
from dbkernels.ops.layer.projection import add_product, chunks
from dbkernels.ops.softmax_gradient import empty_logits, softmax_gradient

SHARE = 16  # of the logits is a chunk; of what eager holds, which is three times the logits, 48
ENOUGH = 4096  # tokens, at which reading and writing the sums costs little beside the matmuls
TILE = 128  # tokens, of which a matmul's tiles are full


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


# allocation and autograd


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, head: Head
) -> tuple[Tensor, list[Tensor | None]]:
    """nll (N,), and the gradients of sum_n scale[n] * nll[n] that are wanted, from x (N, D).

    That of x is as its matmul gives it, those of weight and bias are sums in float32 at least.
    """
    wide = {"dtype": torch.promote_types(head.dtype, torch.float32)}
    dx = torch.empty_like(x, dtype=head.dtype) if "x" in head.wanted else None
    dweight = x.new_zeros(weight.shape, **wide) if "weight" in head.wanted else None
    dbias = x.new_zeros(len(weight), **wide) if "bias" in head.wanted else None
    weight = weight.to(head.dtype)
    bias = None if bias is None else bias.to(head.dtype)
    V, D = weight.shape
    size = tokens_per_chunk(len(x), V, D)
    buffer = empty_logits(min(size, len(x)), V, head.dtype, x.device)
    nll = torch.empty_like(scale)
    for chunk in chunks(len(x), size):
        x_chunk = x[chunk].to(head.dtype)
        padded = buffer[: len(x_chunk)]
        _write_logits(padded[:, :V], x_chunk, weight, bias)
        scales = scale[chunk] if head.wanted else None
        softmax_gradient(padded, target[chunk], scales, nll[chunk], V, head.ignore_index)
        g = padded[:, :V]
        if dx is not None:
            torch.mm(g, weight, out=dx[chunk])
        if dweight is not None:
            add_product(dweight, g.T, x_chunk)
        if dbias is not None:
            dbias.add_(g.sum(0, dtype=dbias.dtype))
    return nll, [dx, dweight, dbias]


def _write_logits(logits: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Rounds once, with a bias too."""
    # a compiler takes no out= with padding between its rows
    if bias is None:
        logits.addmm_(x, weight.T, beta=0)
    else:
        logits.copy_(bias).addmm_(x, weight.T)


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
        owned = is_last_to_read()
        gradients = (
            None if gradient is None else _scaled(gradient, dloss, owned).to(dtype)
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
        scale = _where_counted(scale * dloss, target, ctx.head.ignore_index)
        with dtypes_as_they_are(x.device.type):
            _, gradients = linear_cross_entropy_forward(x, weight, bias, target, scale, ctx.head)
        given = zip(gradients, (x, weight, bias), strict=True)
        return None, *(None if g is None else g.to(t.dtype) for g, t in given), None, None


def _scaled(gradient: Tensor, factor: Tensor, owned: bool) -> Tensor:
    # the factor in the gradient's own dtype would be rounded, in float16 even to 0
    wide = gradient.to(factor.dtype)
    return wide.mul_(factor) if owned or wide is not gradient else wide * factor


def _where_counted(values: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return values.masked_fill(target == ignore_index, 0)


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
    dtype = compute_dtype(x, weight)
    given = {"x": x, "weight": weight, "bias": bias}
    wanted = {name for name, t in given.items() if t is not None and t.requires_grad}
    head = Head(dtype, ignore_index, frozenset(wanted if torch.is_grad_enabled() else ()))
    targets = target.reshape(-1)
    if token_weight is None:
        token_weight = torch.ones_like(target, dtype=dtype)
    scale = token_weight.to(torch.promote_types(dtype, torch.float32)).reshape(-1)
    scale = _where_counted(scale, targets, ignore_index)
    tensors = x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, targets.contiguous()
    if reduction == "none":
        return _TokenLosses.apply(head, *tensors, scale).view(target.shape)
    if reduction == "sum":
        return _SummedLoss.apply(head, *tensors, scale)
    count = (targets != ignore_index).sum().clamp_min(1).to(scale.dtype)
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
