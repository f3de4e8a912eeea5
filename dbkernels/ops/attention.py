"""Softmax attention by torch's flash kernels.

    out       = softmax(q k^T / sqrt(d)) v
    logsumexp = log(sum_keys exp(q k^T / sqrt(d)))

Vaswani et al. 2017 (arXiv:1706.03762); Dao et al. 2022 (arXiv:2205.14135). The kernels are called
by name, so that a caller decides where out and logsumexp are kept, which is all that the backward
needs beside q, k and v. On a GPU float32 goes by the memory-efficient kernel, the others by the
flash kernel; a CPU has one for every dtype.
"""

import torch
from torch import Tensor

from dbkernels.ops.backend import checks

_aten = torch.ops.aten

MAX_HEAD_DIM = 256  # of the flash kernel
ALIGNMENT = 8  # of its heads, in elements: 16 bytes of bfloat16

# allocation and autograd


def attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, N, H * d) and logsumexp, from q (B, H, N, d) and k, v (B, H, T, d).

    Each of them is a view of (B, N or T, H, d). The logsumexp is (B, H, N), of which the
    memory-efficient kernel rounds N up, in float32 or, for float64, float64.
    """
    B, H, N, d = q.shape
    if not q.numel():
        return q.new_empty((B, N, H * d)), q.new_empty((B, H, N), dtype=checks.statistics_dtype(q))
    if q.device.type == "cpu":
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        out, logsumexp, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True
        )
    else:
        out, logsumexp, *_ = _aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2).reshape(B, N, H * d), logsumexp


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v, from contiguous dout (B, N, H * d)."""
    if not q.numel():
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _, H, N, _ = q.shape
    dout, out = _by_head(dout, H), _by_head(out, H)
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, logsumexp, 0.0, False
        )
    # the kernels draw no random numbers without dropout, so they do not look at seed and offset
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, ()))
    if q.dtype == torch.float32:
        return _aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, logsumexp, seed, offset, 0.0, [True, True, True, False]
        )[:3]
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, logsumexp, None, None, N, k.shape[2], 0.0, False, seed, offset
    )


def _by_head(x: Tensor, H: int) -> Tensor:
    return x.view(*x.shape[:2], H, -1).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = attention_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, dout):
        checks.refuse_double_backward("attention")
        return attention_backward(dout.contiguous(), *ctx.saved_tensors)


# public


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every token attend to every token of its sample, head by head.

    Args:
        q:  (B, T, H, d)  float32, bfloat16 or float16, on a CPU also float64. On a GPU d is a
            multiple of ALIGNMENT and at most MAX_HEAD_DIM
        k:  (B, T, H, d)  dtype of q
        v:  (B, T, H, d)  dtype of q
    Returns:
        (B, T, H, d), dtype of q. Softmax and sums are at least float32 inside. The gradient has the
        same bits every run if `torch.use_deterministic_algorithms` asks for it.
    Raises:
        ValueError: a shape, dtype or device disagrees, or d does not suit a GPU.
        RuntimeError: the gradient is differentiated.
    """
    _check(q, k, v)
    return _Attention.apply(*(_token_major(x).transpose(1, 2) for x in (q, k, v))).view(q.shape)


def _token_major(x: Tensor) -> Tensor:
    """x itself where each token's heads are one run of memory and tokens follow each other."""
    _, T, H, d = x.shape
    batch, token, head, column = x.stride()
    ordered = (head, column) == (d, 1) and token >= H * d and batch >= T * token
    return x if ordered else x.contiguous()


def _check(q, k, v):
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must be (B, T, H, d) alike, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    checks.check_floats(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_head_width(q.device, q.shape[-1])


def check_head_width(device: torch.device, d: int) -> None:
    """Whether the device's attention takes heads of d elements."""
    if device.type != "cpu" and (d % ALIGNMENT or d > MAX_HEAD_DIM):
        raise ValueError(
            f"on a GPU the head width must be a multiple of {ALIGNMENT} and at most "
            f"{MAX_HEAD_DIM}, got {d}"
        )
