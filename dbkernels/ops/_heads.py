"""The heads of a projection: what is refused, how they are tiled, loaded by halves and rotated."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.tile import LANES, WARPS, tiles_per_program

MAX_HEAD_DIM = 1024  # both halves of a head live in the registers of one program


@dataclass(frozen=True)
class HeadTile:
    """BLOCK_T heads by BLOCK_D lanes, for each half of a head."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int = WARPS


def head_tile(d: int) -> HeadTile:
    """As many heads as give every thread 8 lanes of each half.

    No two threads hold one element, so a tile may be stored over what it was loaded from.
    """
    lanes = triton.next_power_of_2(triton.cdiv(d, 2))
    return HeadTile(BLOCK_T=LANES * WARPS // lanes, BLOCK_D=lanes)


class Launch(NamedTuple):
    """How many programs share the tokens, and what each of them is told."""

    programs: int
    tokens_per_program: int
    options: dict[str, int]


def launch(qkv: Tensor, heads: int, registers: int) -> Launch:
    """One wave of programs that share the tokens of qkv (B, T, 3 D).

    Args:
        qkv:        (B, T, 3 D), or its gradient
        heads:      of D
        registers:  of a thread of the kernel
    """
    tokens, d = qkv.shape[0] * qkv.shape[1], qkv.shape[2] // (3 * heads)
    # queries and keys have programs of their own
    each = tiles_per_program(tokens, registers, WARPS, qkv.device, beside=2)
    options = {"HEAD_DIM": d, **asdict(head_tile(d)), "maxnreg": registers}
    return Launch(triton.cdiv(tokens, each), each, options)


@triton.jit
def load_halves(ptr, start, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads at start (BLOCK_T, 1) by halves, as float32; 0 past a half and where mask is off."""
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    cols = tl.arange(0, BLOCK_D)[None, :]
    a = tl.load(ptr + start + cols, mask=mask & (cols < half), other=0.0)
    b = tl.load(ptr + start + half + cols, mask=mask & (cols < HEAD_DIM - half), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_halves(ptr, start, mask, a, b, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    cols = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + start + cols, a, mask=mask & (cols < half))
    tl.store(ptr + start + half + cols, b, mask=mask & (cols < HEAD_DIM - half))


@triton.jit
def load_head_weights(
    part, q_weight_ptr, k_weight_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    mask = tl.full((1, 1), 1, tl.int1)
    q_a, q_b = load_halves(q_weight_ptr, 0, mask, HEAD_DIM, BLOCK_D)
    k_a, k_b = load_halves(k_weight_ptr, 0, mask, HEAD_DIM, BLOCK_D)
    return tl.where(part == 0, q_a, k_a), tl.where(part == 0, q_b, k_b)


@triton.jit
def load_angles(table_ptr, t, mask, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosine and sine of each pair; the second half of a table repeats the first."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = mask & (cols < HEAD_DIM // 2)
    cos = tl.load(table_ptr + t.to(tl.int64) * HEAD_DIM + cols, mask=mask, other=0.0)
    sin = tl.load(table_ptr + (t.to(tl.int64) + T) * HEAD_DIM + cols, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def reciprocal_rms(a, b, eps, HEAD_DIM: tl.constexpr):
    return 1 / tl.sqrt(tl.sum(a * a + b * b, axis=1)[:, None] / HEAD_DIM + eps)


def queries_and_keys(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, heads, -1))[:, :, :2]  # (B, T, 2, H, d)


def angles(rotary: Tensor) -> Tensor:
    return rotary[:, :, None, None, : rotary.shape[-1] // 2]  # (2, T, 1, 1, d/2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def check_heads(
    qkv: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotary: Tensor | None,
) -> None:
    """One shape of head, and something to do with it."""
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"qkv must be (B, T, 3 D) with D a multiple of heads, got {tuple(qkv.shape)} "
            f"and {heads} heads"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together, got one of them")
    if q_weight is None and rotary is None:
        raise ValueError("give q_weight and k_weight, rotary, or all three: else there is no work")
    checks.check_floats(qkv=qkv, q_weight=q_weight, k_weight=k_weight, rotary=rotary)
    T, d = qkv.shape[1], qkv.shape[2] // (3 * heads)
    if d > MAX_HEAD_DIM:
        raise ValueError(f"the head width must be 1 to {MAX_HEAD_DIM}, got {d}")
    for name, weight in {"q_weight": q_weight, "k_weight": k_weight}.items():
        if weight is not None and weight.shape != (d,):
            raise ValueError(f"{name} must be (d,) = ({d},), got {tuple(weight.shape)}")
    if rotary is not None:
        check_rotary(rotary, T, d)


def check_rotary(rotary: Tensor, T: int, d: int) -> None:
    if d % 2:
        raise ValueError(f"the head width must be even to be rotated, got {d}")
    if rotary.shape != (2, T, d) or rotary.dtype != torch.float32:
        raise ValueError(
            f"rotary must be (2, T, d) = (2, {T}, {d}) of torch.float32, "
            f"got {tuple(rotary.shape)} of {rotary.dtype}"
        )
    if rotary.requires_grad:
        raise ValueError("rotary must not require a gradient: none is computed for it")
