"""Norm of queries and keys and their rotation by position, in one pass over both.

    x_hat = x * rstd * weight,    rstd = 1 / sqrt(mean(x**2) + eps)
    y     = (a * cos - b * sin, b * cos + a * sin),    x_hat = (a, b) by halves

over the d elements of a head; either step may be left out. Henry et al. 2020 (arXiv:2010.04245)
with the RMS norm of Zhang & Sennrich 2019 (arXiv:1910.07467); Su et al. 2021 (arXiv:2104.09864).

Backward: dy turned the other way is the gradient g in x_hat, and with every mean over d

    dx      = rstd * (weight * g - x * rstd * mean(weight * g * x * rstd))
    dweight = sum_tokens sum_heads g * x * rstd

A tile holds heads by halves, so a thread owns both elements of a pair. In bfloat16 an access has 16
bytes where d / 2 is a multiple of 8 and as many as d / 2 allows elsewhere: 8 at d = 72.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.adaln_norm import normalise, reciprocal_root, rms_norm_backward
from dbkernels.ops.backend import checks, sums
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import LANES, WARPS, tiles_per_program

MAX_HEAD_DIM = 1024  # both halves of a head live in the registers of one program
# of a thread: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = 64
BACKWARD_REGISTERS = 80

# kernels: a program takes the queries (part 0) or the keys (part 1) of a run of tokens


@triton.jit
def _load_halves(ptr, start, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads at start (BLOCK_T, 1) by halves, as float32; 0 past a half and where mask is off."""
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    cols = tl.arange(0, BLOCK_D)[None, :]
    a = tl.load(ptr + start + cols, mask=mask & (cols < half), other=0.0)
    b = tl.load(ptr + start + half + cols, mask=mask & (cols < HEAD_DIM - half), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_halves(ptr, start, mask, a, b, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    cols = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + start + cols, a, mask=mask & (cols < half))
    tl.store(ptr + start + half + cols, b, mask=mask & (cols < HEAD_DIM - half))


@triton.jit
def _load_head_weights(
    part, q_weight_ptr, k_weight_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    mask = tl.full((1, 1), 1, tl.int1)
    q_a, q_b = _load_halves(q_weight_ptr, 0, mask, HEAD_DIM, BLOCK_D)
    k_a, k_b = _load_halves(k_weight_ptr, 0, mask, HEAD_DIM, BLOCK_D)
    return tl.where(part == 0, q_a, k_a), tl.where(part == 0, q_b, k_b)


@triton.jit
def _load_angles(table_ptr, t, mask, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosine and sine of each pair; the second half of a table repeats the first."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = mask & (cols < HEAD_DIM // 2)
    cos = tl.load(table_ptr + t.to(tl.int64) * HEAD_DIM + cols, mask=mask, other=0.0)
    sin = tl.load(table_ptr + (t.to(tl.int64) + T) * HEAD_DIM + cols, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _reciprocal_rms(a, b, eps, HEAD_DIM: tl.constexpr):
    return reciprocal_root(tl.sum(a * a + b * b, axis=1)[:, None] / HEAD_DIM, eps)


@triton.jit(do_not_specialize=["tokens", "T", "tokens_per_program"])
def _fwd_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr,  # (B*T, 3, H, d), (d,), (d,), (2, T, d)
    qk_ptr,                                          # (B*T, 2, H, d)
    tokens, T, H, tokens_per_program, eps,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, part = tl.program_id(0).to(tl.int64) * tokens_per_program, tl.program_id(1)
    heads = tl.minimum(tokens - first, tokens_per_program).to(tl.int32) * H
    first_t = (first % T).to(tl.int32)
    if q_weight_ptr is not None:
        weight_a, weight_b = _load_head_weights(part, q_weight_ptr, k_weight_ptr, HEAD_DIM, BLOCK_D)

    for start in range(0, heads, BLOCK_T):
        head = start + tl.arange(0, BLOCK_T)[:, None]
        token, mask = first + head // H, head < heads
        x_start = ((3 * token + part) * H + head % H) * HEAD_DIM
        a, b = _load_halves(qkv_ptr, x_start, mask, HEAD_DIM, BLOCK_D)

        if q_weight_ptr is not None:
            rstd = _reciprocal_rms(a, b, eps, HEAD_DIM)
            a, b = a * rstd * weight_a, b * rstd * weight_b
        if table_ptr is not None:
            t = (first_t + head // H) % T
            cos, sin = _load_angles(table_ptr, t, mask, T, HEAD_DIM, BLOCK_D)
            a, b = a * cos - b * sin, b * cos + a * sin

        y_start = ((2 * token + part) * H + head % H) * HEAD_DIM
        _store_halves(qk_ptr, y_start, mask, a, b, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "T", "tokens_per_program"])
def _bwd_kernel(
    dqkv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr,  # (B*T, 3, H, d) twice, as above
    dq_weight_ptr, dk_weight_ptr,                              # (programs, d) each
    tokens, T, H, tokens_per_program, eps,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, part = tl.program_id(0).to(tl.int64) * tokens_per_program, tl.program_id(1)
    heads = tl.minimum(tokens - first, tokens_per_program).to(tl.int32) * H
    first_t = (first % T).to(tl.int32)
    if q_weight_ptr is not None:
        weight_a, weight_b = _load_head_weights(part, q_weight_ptr, k_weight_ptr, HEAD_DIM, BLOCK_D)
        dweight_a = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        dweight_b = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)

    for start in range(0, heads, BLOCK_T):
        head = start + tl.arange(0, BLOCK_T)[:, None]
        mask = head < heads
        x_start = ((3 * (first + head // H) + part) * H + head % H) * HEAD_DIM
        a, b = _load_halves(dqkv_ptr, x_start, mask, HEAD_DIM, BLOCK_D)

        if table_ptr is not None:
            t = (first_t + head // H) % T
            cos, sin = _load_angles(table_ptr, t, mask, T, HEAD_DIM, BLOCK_D)
            a, b = a * cos + b * sin, b * cos - a * sin
        if q_weight_ptr is not None:
            x_a, x_b = _load_halves(qkv_ptr, x_start, mask, HEAD_DIM, BLOCK_D)
            rstd = _reciprocal_rms(x_a, x_b, eps, HEAD_DIM)
            x_a, x_b = x_a * rstd, x_b * rstd
            dweight_a, dweight_b = dweight_a + a * x_a, dweight_b + b * x_b
            a, b = a * weight_a, b * weight_b
            mean = tl.sum(a * x_a + b * x_b, axis=1)[:, None] / HEAD_DIM
            a, b = rstd * (a - x_a * mean), rstd * (b - x_b * mean)

        _store_halves(dqkv_ptr, x_start, mask, a, b, HEAD_DIM, BLOCK_D)

    if q_weight_ptr is not None:
        # each program owns one row of partial sums: no atomics, so every run gives the same bits
        dweight_a = tl.sum(dweight_a, axis=0)[None, :]
        dweight_b = tl.sum(dweight_b, axis=0)[None, :]
        out, mask = tl.program_id(0) * HEAD_DIM, tl.full((1, 1), 1, tl.int1)
        of_q, of_k = mask & (part == 0), mask & (part == 1)
        _store_halves(dq_weight_ptr, out, of_q, dweight_a, dweight_b, HEAD_DIM, BLOCK_D)
        _store_halves(dk_weight_ptr, out, of_k, dweight_a, dweight_b, HEAD_DIM, BLOCK_D)


# launchers: they write into tensors of their caller


def head_launch(qkv: Tensor, heads: int, registers: int) -> tuple[int, int, dict]:
    """Programs to share the tokens of qkv (B, T, 3 D) in one wave, tokens of each, and options.

    A tile has BLOCK_T heads by BLOCK_D lanes for each half of a head, 8 of each half to a thread.
    No two threads hold one element, so a tile may be stored over what it was loaded from.
    """
    tokens, d = qkv.shape[0] * qkv.shape[1], qkv.shape[2] // (3 * heads)
    lanes = triton.next_power_of_2(triton.cdiv(d, 2))
    block = {"BLOCK_T": LANES * WARPS // lanes, "BLOCK_D": lanes}
    # queries and keys have programs of their own
    each = tiles_per_program(tokens, registers, WARPS, qkv.device, beside=2)
    options = {"HEAD_DIM": d, **block, "num_warps": WARPS, "maxnreg": registers}
    return triton.cdiv(tokens, each), each, options


def _forward_triton(qkv, q_weight, k_weight, rotary, qk, heads, eps):
    B, T, _ = qkv.shape
    programs, each, options = head_launch(qkv, heads, FORWARD_REGISTERS)
    _fwd_kernel[(programs, 2)](
        qkv, q_weight, k_weight, rotary, qk, B * T, T, heads, each, eps, **options
    )


def _forward_torch(qkv, q_weight, k_weight, rotary, qk, heads, eps):
    x = _queries_and_keys(qkv, heads).to(checks.statistics_dtype(qkv))
    if q_weight is not None:
        x = normalise(x, eps, centred=False)[0] * torch.stack([q_weight, k_weight])[:, None]
    if rotary is not None:
        x = _rotate(x, rotary)
    qk.copy_(x)


def _backward_triton(dqkv, qkv, q_weight, k_weight, rotary, dq_weight, dk_weight, heads, eps):
    B, T, _ = dqkv.shape
    programs, each, options = head_launch(dqkv, heads, BACKWARD_REGISTERS)
    with sums.sums_of_all(B * T, each, dq_weight, dk_weight) as parts:
        _bwd_kernel[(programs, 2)](
            dqkv, qkv, q_weight, k_weight, rotary, *parts, B * T, T, heads, each, eps, **options
        )


def _backward_scratch(dqkv, qkv, q_weight, k_weight, rotary, dq_weight, dk_weight, heads, eps):
    programs, *_ = head_launch(dqkv, heads, BACKWARD_REGISTERS)
    return sums.scratch_of_all(programs, dq_weight, dk_weight)


def _backward_torch(dqkv, qkv, q_weight, k_weight, rotary, dq_weight, dk_weight, heads, eps):
    dx = _queries_and_keys(dqkv, heads)
    g = dx.to(checks.statistics_dtype(dqkv))
    if rotary is not None:
        g = _rotate(g, rotary, back=True)
    if q_weight is not None:
        x_hat, stats = normalise(_queries_and_keys(qkv, heads), eps, centred=False)
        dq_sums, dk_sums = (g * x_hat).sum((0, 1, 3))
        dq_weight.copy_(dq_sums), dk_weight.copy_(dk_sums)
        g = g * torch.stack([q_weight, k_weight])[:, None]
        g = rms_norm_backward(g, x_hat, stats[..., 1:])
    dx.copy_(g)


def _queries_and_keys(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, heads, -1))[:, :, :2]  # (B, T, 2, H, d)


def _rotate(x: Tensor, rotary: Tensor, *, back: bool = False) -> Tensor:
    cos, sin = rotary[:, :, None, None, : rotary.shape[-1] // 2]  # (T, 1, 1, d/2) each
    sin = -sin if back else sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


_forward_op = register(
    "qk_norm_rotary_fwd(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? rotary,"
    " Tensor(a!) qk, int heads, float eps) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
# Turns the gradients of processed queries and keys into those of the raw ones, in place, and leaves
# the last third of dqkv alone. qkv is the raw input of the forward in storage of its own; it is
# read for the norm only, and without one may be None
qk_norm_rotary_backward = register(
    "qk_norm_rotary_bwd(Tensor(a!) dqkv, Tensor? qkv, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? rotary, Tensor(b!)? dq_weight, Tensor(c!)? dk_weight, int heads, float eps) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
    scratch=_backward_scratch,
)


# allocation and autograd


def qk_norm_rotary_forward(
    qkv: Tensor, weights: Iterable[Tensor | None], rotary: Tensor | None, heads: int, eps: float
) -> Tensor:
    """Processed queries and keys (B, T, 2, H, d) from contiguous qkv (B, T, 3 D)."""
    B, T, D = qkv.shape
    qk = qkv.new_empty((B, T, 2, heads, D // (3 * heads)))
    _forward_op(qkv, *weights, rotary, qk, heads, eps)
    return qk


class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, rotary, heads, eps):
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, rotary)
        ctx.eps = eps
        return qk_norm_rotary_forward(qkv, (q_weight, k_weight), rotary, heads, eps)

    @staticmethod
    def backward(ctx, dqk):
        checks.refuse_double_backward("qk_norm_rotary")
        _, *weights, _ = saved = ctx.saved_tensors
        dweights = [None if weight is None else torch.empty_like(weight) for weight in weights]
        B, T, _, H, d = dqk.shape
        dqkv = dqk.new_empty((B, T, 3, H, d))
        dqkv[:, :, :2], dqkv[:, :, 2] = dqk, 0
        dqkv = dqkv.flatten(2)
        qk_norm_rotary_backward(dqkv, *saved, *dweights, H, ctx.eps)
        return dqkv, *dweights, None, None, None


# public


def qk_norm_rotary(
    qkv: Tensor,
    heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rotary: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Give the queries and keys of a projection their RMS norm, their rotation, or both in turn.

    Args:
        qkv:       (B, T, 3 D)  queries, keys, values: float32, bfloat16 or float16
        heads:     H; the head width d is D / H
        q_weight:  (d,)         of the norm of the queries; None is no norm
        k_weight:  (d,)         of the norm of the keys; given if q_weight is
        rotary:    (2, T, d)    float32 cosines and sines, each half repeated, so that only the
                                first is read; turns the pairs (i, i + d/2). None is no rotation
        eps:       added to the mean square, so in units of qkv**2
    Returns:
        Queries and keys, (B, T, H, d) each, dtype of qkv. Sums and steps are float32 inside.
    Raises:
        ValueError: a shape, dtype or device disagrees, d > MAX_HEAD_DIM, d is odd and rotated,
            rotary requires a gradient, one weight is given alone, or there is nothing to do.
        RuntimeError: the gradient is differentiated.
    """
    _check(qkv, heads, q_weight, k_weight, rotary)
    given = (x if x is None else x.contiguous() for x in (qkv, q_weight, k_weight, rotary))
    return _QKNormRotary.apply(*given, heads, eps).unbind(2)


def _check(qkv, heads, q_weight, k_weight, rotary):
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"qkv must be (B, T, 3 D) with D a multiple of heads, got {tuple(qkv.shape)} "
            f"and {heads} heads"
        )
    if q_weight is k_weight is rotary is None:
        raise ValueError("give q_weight and k_weight, rotary, or all three: else there is no work")
    checks.check_floats(qkv=qkv, q_weight=q_weight, k_weight=k_weight, rotary=rotary)
    T, d = qkv.shape[1], qkv.shape[2] // (3 * heads)
    if d > MAX_HEAD_DIM:
        raise ValueError(f"the head width must be 1 to {MAX_HEAD_DIM}, got {d}")
    checks.check_heads(q_weight, k_weight, rotary, T, d)
