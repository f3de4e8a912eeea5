"""Attention of two streams: a clean one that is causal, and a noisy one that reads it and itself.

Clean i attends to clean j <= i; noisy i to clean j <= i and to itself, as a token that is drawn
from noise while those before it are known. One begins with a token that stands before the text, so
that clean i is the token before noisy i. For the noisy stream, with q, k and v of it alone,

    o, l   = attention of q over clean keys j <= i, and its logsumexp
    s      = q . k / sqrt(d)                       the token itself
    l'     = log(exp(l) + exp(s)),    b = exp(s - l')
    out    = (1 - b) * o + b * v

by two causal calls of the flash kernels and one kernel that merges: nothing of T x T exists. Given
the merged out and l', the flash backward computes p = exp(q . k / sqrt(d) - l') and
delta = sum_d dout * out of the whole, so what it gives is right for clean keys; of the token itself

    ds = b * sum_d dout * (v - out),    dv = b * dout
    dq = dq of clean keys + ds * k / sqrt(d),    dk = ds * q / sqrt(d)

Arriola et al. 2025 (arXiv:2503.09573), with blocks of one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.attention import (
    attention_backward,
    attention_forward,
    check_queries_keys_values,
    token_major,
)
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import LANES, WARPS, tiles_per_program

# of a thread: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = 56
BACKWARD_REGISTERS = 64

# kernels: a program takes all heads of a run of tokens


@triton.jit
def _load(ptr, start, mask):
    return tl.load(ptr + start, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _heads_of_tile(first, start, heads, T, H, BLOCK_T: tl.constexpr):
    """Of (BLOCK_T, 1) heads: their rows, where they lie in a row and in (B, H), t, and a mask."""
    head = start + tl.arange(0, BLOCK_T)[:, None]
    h, token = head % H, (first % T).to(tl.int32) + head // H
    return first + head // H, h, (first // T + token // T) * H + h, token % T, head < heads


@triton.jit(do_not_specialize=["rows", "T", "rows_per_program"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,  # (B*T, H, d) each; rows of o are H d apart
    out_ptr, logsumexp_ptr,      # (B*T, H, d), (B, H, T or more)
    rows, T, H, stride_q, stride_k, stride_v, stride_l, rows_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    heads = tl.minimum(rows - first, rows_per_program).to(tl.int32) * H
    cols = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, heads, BLOCK_T):
        row, h, batch_head, t, there = _heads_of_tile(first, start, heads, T, H, BLOCK_T)
        within, mask = h * HEAD_DIM + cols, there & (cols < HEAD_DIM)
        at = row * (H * HEAD_DIM) + within
        q = _load(q_ptr, row * stride_q + within, mask)
        k = _load(k_ptr, row * stride_k + within, mask)
        v = _load(v_ptr, row * stride_v + within, mask)
        o = _load(o_ptr, at, mask)
        of_clean = _load(logsumexp_ptr, batch_head * stride_l + t, there)

        own = tl.sum(q * k, axis=1)[:, None] * HEAD_DIM**-0.5
        # not by the merged logsumexp, which is rounded: both shares add up to 1
        out = tl.sigmoid(of_clean - own) * o + tl.sigmoid(own - of_clean) * v
        less = tl.exp(-tl.abs(own - of_clean))
        merged = tl.maximum(own, of_clean) + tl.log(1.0 + less)

        tl.store(out_ptr + at, out, mask=mask)
        tl.store(logsumexp_ptr + batch_head * stride_l + t, merged, mask=there)


@triton.jit(do_not_specialize=["rows", "T", "rows_per_program"])
def _bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr,      # (B*T, H, d) each; rows of dout and out H d apart
    logsumexp_ptr, dq_clean_ptr,                 # (B, H, T or more), (B*T, H, d)
    dq_ptr, dk_ptr, dv_ptr,                      # (B*T, H, d) each
    rows, T, H, stride_q, stride_k, stride_v, stride_l, rows_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    heads = tl.minimum(rows - first, rows_per_program).to(tl.int32) * H
    cols = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, heads, BLOCK_T):
        row, h, batch_head, t, there = _heads_of_tile(first, start, heads, T, H, BLOCK_T)
        within, mask = h * HEAD_DIM + cols, there & (cols < HEAD_DIM)
        at = row * (H * HEAD_DIM) + within
        q = _load(q_ptr, row * stride_q + within, mask)
        k = _load(k_ptr, row * stride_k + within, mask)
        v = _load(v_ptr, row * stride_v + within, mask)
        dout = _load(dout_ptr, at, mask)
        out = _load(out_ptr, at, mask)
        dq = _load(dq_clean_ptr, at, mask)
        merged = _load(logsumexp_ptr, batch_head * stride_l + t, there)

        scale: tl.constexpr = HEAD_DIM**-0.5
        share = tl.exp(tl.sum(q * k, axis=1)[:, None] * scale - merged)
        ds = share * tl.sum(dout * (v - out), axis=1)[:, None] * scale

        tl.store(dq_ptr + at, dq + ds * k, mask=mask)
        tl.store(dk_ptr + at, ds * q, mask=mask)
        tl.store(dv_ptr + at, share * dout, mask=mask)


# launchers: they write into tensors of their caller


def _launch(kernel, registers, tensors, strided, logsumexp):
    """tensors: as the kernel takes them; strided: of them those whose rows may lie apart."""
    # sizes and no strides of what is contiguous: a dimension of 1 may have any stride
    rows, H, d = strided[0].shape
    lanes = triton.next_power_of_2(d)
    block = {"BLOCK_T": max(LANES * WARPS // lanes, 1), "BLOCK_D": lanes}
    each = tiles_per_program(rows, registers, WARPS, logsumexp.device)
    kernel[(triton.cdiv(rows, each),)](
        *tensors, rows, rows // len(logsumexp), H, *(t.stride(0) for t in strided),
        logsumexp.shape[2], each,
        HEAD_DIM=d, **block, num_warps=WARPS, maxnreg=registers,
    )  # fmt: skip


def _forward_triton(q, k, v, o, out, logsumexp):
    tensors = q, k, v, o, out, logsumexp
    _launch(_fwd_kernel, FORWARD_REGISTERS, tensors, (q, k, v), logsumexp)


def _backward_triton(dout, q, k, v, out, logsumexp, dq_clean, dq, dk, dv):
    tensors = dout, q, k, v, out, logsumexp, dq_clean, dq, dk, dv
    _launch(_bwd_kernel, BACKWARD_REGISTERS, tensors, (q, k, v), logsumexp)


def _of_rows(logsumexp: Tensor, rows: int) -> Tensor:
    """(B, H, T or more) as (B, T, H)."""
    return logsumexp[..., : rows // len(logsumexp)].transpose(1, 2)


def _own(q: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """Each token's product with itself, in the shape of `like` (B, T, H)."""
    return ((q.to(like.dtype) * k).sum(-1) * q.shape[-1] ** -0.5).view(like.shape)


def _forward_torch(q, k, v, o, out, logsumexp):
    of_clean = _of_rows(logsumexp, len(q))
    own = _own(q, k, of_clean)
    rest, share = (
        torch.sigmoid(x).flatten(0, 1)[..., None] for x in (of_clean - own, own - of_clean)
    )
    out.copy_(rest * o + share * v)
    of_clean.copy_(torch.logaddexp(of_clean, own))


def _backward_torch(dout, q, k, v, out, logsumexp, dq_clean, dq, dk, dv):
    merged = _of_rows(logsumexp, len(q))
    share = (_own(q, k, merged) - merged).exp().flatten(0, 1)[..., None]
    dout = dout.to(merged.dtype)
    ds = share * (dout * (v.to(merged.dtype) - out)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    dq.copy_(dq_clean + ds * k)
    dk.copy_(ds * q)
    dv.copy_(share * dout)


# of the noisy stream: out may be o itself, and logsumexp becomes that of all its keys
_forward_op = register(
    "two_stream_fwd(Tensor q, Tensor k, Tensor v, Tensor o, Tensor(a!) out, Tensor(b!) logsumexp)"
    " -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
# dq may be dq_clean itself
_backward_op = register(
    "two_stream_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
    " Tensor dq_clean, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
)


# allocation and autograd


def two_stream_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (N, T, H * d) and logsumexp (N, H, T), from q (N, H, T, d) and k, v (2B, H, T, d).

    The noisy stream is the first half of k and v. N is 2B, or B: then the clean stream has keys and
    values alone, and no results. Views and logsumexp are as those of `attention_forward`.
    """
    (N, H, T, d), B = q.shape, len(k) // 2
    clean = k[B:], v[B:]
    if N > B:
        out = q.new_empty((N, T, H * d))
        out[B:], of_clean = attention_forward(q[B:], *clean, causal=True)
    o, logsumexp = attention_forward(q[:B], *clean, causal=True)
    if N > B:
        logsumexp = torch.cat([logsumexp, of_clean])
    else:
        out, logsumexp = o, logsumexp.contiguous()
    noisy = (_rows(t[:B]) for t in (q, k, v))
    _forward_op(*noisy, *(t[:B].view(B * T, H, d) for t in (o, out)), logsumexp[:B])
    return out, logsumexp


def two_stream_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v, from contiguous dout (N, T, H * d)."""
    (N, H, T, d), B = q.shape, len(k) // 2
    noisy, clean = slice(B), slice(B, None)

    def of_clean_keys(rows: slice) -> list[Tensor]:
        """dq of some queries, and what they add to dk and dv, (B, T, H, d) each."""
        given = (t[rows] for t in (out, logsumexp))
        grads = attention_backward(dout[rows], q[rows], k[clean], v[clean], *given, causal=True)
        return [t.transpose(1, 2) for t in grads]

    dq_clean, *more = of_clean_keys(noisy)
    dk, dv = (q.new_empty((2 * B, T, H, d)) for _ in range(2))
    if N > B:
        dq = q.new_empty((N, T, H, d))
        dq[clean], *others = of_clean_keys(clean)
        for whole, one, other in zip((dk, dv), more, others, strict=True):
            torch.add(one, other, out=whole[clean])
    else:
        dq, dk[clean], dv[clean] = dq_clean, *more
    of_noisy = (t[noisy].reshape(B * T, H, d) for t in (dq_clean, dq, dk, dv))
    rows = (_rows(t[noisy]) for t in (q, k, v))
    upstream, result = (t[noisy].view(B * T, H, d) for t in (dout, out))
    _backward_op(upstream, *rows, result, logsumexp[noisy], *of_noisy)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, d) as (B * T, H, d)."""
    return x.transpose(1, 2).flatten(0, 1)


class _TwoStreamAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = two_stream_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, dout):
        checks.refuse_double_backward("two_stream_attention")
        return two_stream_backward(dout.contiguous(), *ctx.saved_tensors)


# public


def two_stream_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let clean tokens attend to those up to their own, and noisy ones to these and themselves.

    Args:
        q:  (2B, T, H, d)  the noisy stream's samples, then the clean one's: float32, bfloat16 or
            float16, on a CPU also float64. On a GPU d as that of `attention`
        k:  (2B, T, H, d)  dtype of q
        v:  (2B, T, H, d)  dtype of q
    Returns:
        (2B, T, H, d), dtype of q. Softmax and sums are at least float32 inside. The gradient has
        the same bits every run if `torch.use_deterministic_algorithms` asks for it.
    Raises:
        ValueError: a shape, dtype or device disagrees, the number of samples is odd, or d does not
            suit a GPU.
        RuntimeError: the gradient is differentiated.
    """
    check_queries_keys_values(q, k, v)
    check_streams(len(q))
    by_head = (token_major(x).transpose(1, 2) for x in (q, k, v))
    return _TwoStreamAttention.apply(*by_head).view(q.shape)


def check_streams(samples: int) -> None:
    """Whether they are as many noisy as clean ones."""
    if samples % 2:
        raise ValueError(
            f"two streams must have 2B samples, the noisy ones and then the clean ones, "
            f"got {samples}"
        )
