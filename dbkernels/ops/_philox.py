"""Philox 4x32-10, a bijection of 128-bit counters under a 64-bit key, and normals from its words.

    (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

ten times, with k0 and k1 raised by a constant after each. Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3" (SC '11). Four normals come from the four words, with every number
rounded to float32 on its way:

    r = sqrt(-2 ln(x0 / 2**32 + 2**-33)),    a = 2 pi x1 / 2**32,    n0, n1 = r cos(a), r sin(a)

and n2, n3 from x2, x3. Box & Muller 1958. No normal exceeds sqrt(66 ln 2) < 6.77.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = 10
WORD = 2**32 - 1  # the bits of a word
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
TURN = 2 * math.pi * 2.0**-32  # radians to one unit of a word
NORMALS = 4  # of one counter

# a kernel reads no other kind of global
_ROUNDS, _TURN = tl.constexpr(ROUNDS), tl.constexpr(TURN)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in INCREMENTS)
# pi / 2 in three parts, of which small multiples of the first two are exact
_QUARTER = tl.constexpr(1.5703125)
_QUARTER_REST = tl.constexpr(4.837512969970703e-4)
_QUARTER_LAST = tl.constexpr(7.549789954891882e-8)
_QUARTERS = tl.constexpr(2 / math.pi)

# plain torch


def philox(c0, c1, c2, c3, k0: int, k1: int) -> tuple:
    """The four words of counters.

    Args:
        c0, c1, c2, c3:  integers, or int64 tensors that broadcast, in [0, 2**32)
        k0, k1:          low and high word of the key
    Returns:
        Four integers or int64 tensors in [0, 2**32).
    """
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(c0, MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1, lo1, hi0 ^ c3, lo0
        c0 ^= k0
        c2 ^= k1
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(x, multiplier: int) -> tuple:
    """High and low word of a product."""
    # the product less x * 2**32, because the product itself leaves the range of int64
    product = x * (multiplier - 2**32)
    hi = product >> 32
    hi += x
    product &= WORD
    return hi, product


def normals_at(sample: Tensor, group: Tensor, step_words, key_words) -> Tensor:
    """Normals of each group of four elements.

    Args:
        sample:      (B, 1) int64
        group:       (G,)   int64, index of an element over four
        step_words:  the counter's last two words, integers or () int64
        key_words:   the two words of the key
    Returns:
        (B, 4 * G) float32.
    """
    words = philox(group, sample, *step_words, *key_words)
    shape = (*words[0].shape, NORMALS)
    normals = torch.empty(shape, dtype=torch.float32, device=group.device)
    for first in (0, 2):
        r = words[first].float().mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_()
        a = words[first + 1].float().mul_(TURN)
        torch.mul(r, a.cos(), out=normals[..., first])
        torch.mul(r, a.sin_(), out=normals[..., first + 1])
    return normals.flatten(1)


# triton


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """`philox` on uint32, scalars or tiles."""
    for _ in tl.static_range(_ROUNDS):
        hi0, hi1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        lo0, lo1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def normal_tile(
    start, sample, step_low, step_high, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normals of BLOCK elements of one sample, from `start`, a multiple of 4; words of 32 bits."""
    c0 = (start // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    x0, x1, x2, x3 = philox_words(
        c0, sample.to(tl.uint32), step_low.to(tl.uint32), step_high.to(tl.uint32),
        key_low.to(tl.uint32), key_high.to(tl.uint32),
    )  # fmt: skip
    n0, n1 = _pair_of_normals(x0, x1)
    n2, n3 = _pair_of_normals(x2, x3)
    # the last dimension of a join is its pair: n0, n1, n2, n3 in this order
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def _pair_of_normals(x0, x1):
    u = x0.to(tl.float32) * 2.0**-32 + 2.0**-33
    r = tl.sqrt_rn(-2 * tl.log(u))
    cos, sin = _cos_sin(x1.to(tl.float32) * _TURN)
    return r * cos, r * sin


@triton.jit
def _cos_sin(a):
    """Of angles in [0, 2 pi], as near as the library's, which spills for angles beyond."""
    quarter = (a * _QUARTERS + 0.5).to(tl.int32)
    k = quarter.to(tl.float32)
    y = a - k * _QUARTER - k * _QUARTER_REST - k * _QUARTER_LAST
    y2 = y * y
    # minimax on [-pi / 4, pi / 4]: Moshier, Cephes, sinf.c
    sin = y + y * y2 * ((-1.9515295891e-4 * y2 + 8.3321608736e-3) * y2 - 1.6666654611e-1)
    tail = (2.443315711809948e-5 * y2 - 1.388731625493765e-3) * y2 + 4.166664568298827e-2
    cos = 1 - 0.5 * y2 + y2 * y2 * tail
    odd = (quarter & 1) == 1
    cos_a, sin_a = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos_a = tl.where(((quarter + 1) & 2) == 2, -cos_a, cos_a)
    return cos_a, tl.where((quarter & 2) == 2, -sin_a, sin_a)
