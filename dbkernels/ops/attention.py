"""Softmax attention by torch's flash kernels.

    out       = softmax(q k^T / sqrt(d)) v
    logsumexp = log(sum_keys exp(q k^T / sqrt(d)))

over all keys or, where it is causal, over those of the query's own place and before. Vaswani et al.
2017 (arXiv:1706.03762); Dao et al. 2022 (arXiv:2205.14135). The kernels are called by name, so that
a caller decides where out and logsumexp are kept, which is all that the backward needs beside q, k
and v. On a GPU float32 goes by the memory-efficient kernel, the others by the flash kernel; a CPU
has one for every dtype.

Those kernels draw a dropout of their own, from a generator. With one by counters, out is

    M * P v,    P = exp(q k^T / sqrt(d) - logsumexp),    M_ij = 0 or 1 / (1 - p)

in plain torch, for a few samples at a time, and the backward computes P and draws M again:

    dv = (M * P)^T dout,    dS = P * (M * (dout v^T) - sum_d dout * out)
    dq = dS k / sqrt(d),    dk = dS^T q / sqrt(d)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.dropout import Dropout, drop

_aten = torch.ops.aten

MAX_HEAD_DIM = 256  # of the flash kernel
ALIGNMENT = 8  # of its heads, in elements: 16 bytes of bfloat16
PAIRS = 2**22  # of queries and keys, whose weights plain torch holds at a time
PLACE = 0  # of the weights' mask among those of a layer

# allocation and autograd


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """out (B, N, H * d) and logsumexp, from q (B, H, N, d) and k, v (B, H, T, d).

    Each of them is a view of (B, N or T, H, d); causal needs N = T. The logsumexp is (B, H, N), of
    which the memory-efficient kernel rounds N up, in float32 or, for float64, float64.
    """
    # kernels differ in where the diagonal of fewer queries than keys lies
    assert not causal or q.shape[2] == k.shape[2]
    B, H, N, d = q.shape
    if not q.numel():
        return q.new_empty((B, N, H * d)), q.new_empty((B, H, N), dtype=checks.statistics_dtype(q))
    if q.device.type == "cpu":
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype == torch.float32:
        out, logsumexp, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=causal
        )
    else:
        out, logsumexp, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(B, N, H * d), logsumexp


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v, from contiguous dout (B, N, H * d)."""
    if not q.numel():  # nothing reads the keys that there may be
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    _, H, N, _ = q.shape
    dout, out = _by_head(dout, H), _by_head(out, H)
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, logsumexp, 0.0, causal
        )
    # the kernels draw no random numbers without dropout, so they do not look at seed and offset
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, ()))
    if q.dtype == torch.float32:
        return _aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, logsumexp, seed, offset, 0.0, [True, True, True, False],
            causal,
        )[:3]  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, logsumexp, None, None, N, k.shape[2], 0.0, causal, seed, offset
    )


def _by_head(x: Tensor, H: int) -> Tensor:
    return x.view(*x.shape[:2], H, -1).transpose(1, 2)


# with dropout of the weights


def dropped_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """`attention_forward`, with some of its weights left out."""
    B, H, N, d = q.shape
    out = q.new_empty((B, N, H * d))
    logsumexp = q.new_empty((B, H, N), dtype=checks.statistics_dtype(q))
    for some, own in _few(q, k, dropout):
        scores = _scores(q[some], k[some])
        logsumexp[some] = scores.logsumexp(-1)
        weights = scores.sub_(logsumexp[some][..., None]).exp_()
        attended = _without(weights, own) @ v[some].to(weights.dtype)
        out[some] = attended.transpose(1, 2).flatten(2).to(out.dtype)
    return out, logsumexp


def dropped_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward` of `dropped_attention_forward`."""
    dq, dk, dv = (
        t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)
        for t in (q, k, v)
    )
    dtype, scale = logsumexp.dtype, q.shape[-1] ** -0.5
    for some, own in _few(q, k, dropout):
        weights = _scores(q[some], k[some]).sub_(logsumexp[some][..., None]).exp_()
        upstream, of_out = (_by_head(t[some], q.shape[1]).to(dtype) for t in (dout, out))
        dv[some] = (_without(weights, own).mT @ upstream).to(dv.dtype)
        dscores = _without(upstream @ v[some].to(dtype).mT, own)
        dscores = dscores.sub_((upstream * of_out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dq[some] = (dscores @ k[some].to(dtype)).to(dq.dtype)
        dk[some] = (dscores.mT @ q[some].to(dtype)).to(dk.dtype)
    return dq, dk, dv


def _few(q: Tensor, k: Tensor, dropout: Dropout) -> Iterator[tuple[slice, Dropout]]:
    """A few samples, and what they leave out, until all are done."""
    B, H, N, _ = q.shape
    size = max(PAIRS // max(H * N * k.shape[2], 1), 1)
    for start in range(0, B, size):
        yield slice(start, min(start + size, B)), dropout.after(start)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    dtype = checks.statistics_dtype(q)
    return (q.to(dtype) @ k.to(dtype).mT).mul_(q.shape[-1] ** -0.5)


def _without(weights: Tensor, dropout: Dropout) -> Tensor:
    """(B, H, N, T) without what is left out; a query has the same, however many there are."""
    # a copy even where one head leaves nothing to reorder: the weights are read again
    by_query = weights.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return drop(by_query, dropout.attention, dropout.draw, PLACE, out=by_query).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        out, logsumexp = attention_forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        checks.refuse_double_backward("attention")
        return *attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.causal), None


# public


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Let every token attend to tokens of its sample, head by head.

    Args:
        q:       (B, T, H, d)  float32, bfloat16 or float16, on a CPU also float64. On a GPU d is a
                 multiple of ALIGNMENT and at most MAX_HEAD_DIM
        k:       (B, T, H, d)  dtype of q
        v:       (B, T, H, d)  dtype of q
        causal:  whether a token attends to itself and those before it alone
    Returns:
        (B, T, H, d), dtype of q. Softmax and sums are at least float32 inside. The gradient has the
        same bits every run if `torch.use_deterministic_algorithms` asks for it.
    Raises:
        ValueError: a shape, dtype or device disagrees, or d does not suit a GPU.
        RuntimeError: the gradient is differentiated.
    """
    check_queries_keys_values(q, k, v)
    by_head = (token_major(x).transpose(1, 2) for x in (q, k, v))
    return _Attention.apply(*by_head, causal).view(q.shape)


def token_major(x: Tensor) -> Tensor:
    """x itself where each token's heads are one run of memory and tokens follow each other."""
    _, T, H, d = x.shape
    batch, token, head, column = x.stride()
    ordered = (head, column) == (d, 1) and token >= H * d and batch >= T * token
    return x if ordered else x.contiguous()


def check_queries_keys_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One shape (B, T, H, d), one dtype, and heads that the device takes."""
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
