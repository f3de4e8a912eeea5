"""Cross-entropy of rows of logits, whose gradient is written over them.

    nll[n] = log(sum_v exp(x[n, v])) - x[n, target[n]]
    dx[n]  = scale[n] * (softmax(x[n]) - one_hot(target[n]))

Milakov & Gimelshein 2018 (arXiv:1805.02867): the peak and the sum of a row in one pass over it.
Rows are padded to S columns, so that each begins on a line of memory; columns past V mean nothing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.activations import chunks, same_dtype
from dbkernels.ops.backend.register import register

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
    for padded, t, s, out, wide in chunks(1, logits, *columns):
        rows, x = padded[:, :V], same_dtype(padded, wide)[:, :V]
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
softmax_gradient = register(
    "softmax_gradient(Tensor(a!) logits, Tensor target, Tensor? scale, Tensor(b!) nll,"
    " SymInt V, int ignore_index) -> ()",
    triton=_gradient_triton,
    torch_=_gradient_torch,
    check=_check_targets,
)


def empty_logits(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, S), of which the logits are the first V columns."""
    return torch.empty((rows, -(-V // LINE) * LINE), dtype=dtype, device=device)
