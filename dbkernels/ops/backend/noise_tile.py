"""The noise of one tile, drawn in the kernel that uses it. `philox` says which numbers these are.

A tensor (B, ...) is B rows of `elements`; a tile lies in one row and starts at a multiple of 4, so
that no counter is shared by two tiles. Coefficients and masks say one thing of each `run` of
elements: of a whole row, of a token or of a single element.
"""

import math

import triton
import triton.language as tl

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
TURN = 2 * math.pi * 2.0**-32  # radians to one unit of a word
# streams: independent numbers of one step and sample; those from DROPOUT on are masks
NOISE, LEVEL, DROPOUT = 0, 1, 2
DRAW = ("step_ptr", "sample", "key_low", "key_high")  # a draw as a kernel takes it

# a kernel reads no other kind of global
_ROUNDS, _TURN, _NOISE = tl.constexpr(ROUNDS), tl.constexpr(TURN), tl.constexpr(NOISE)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in INCREMENTS)
# pi / 2 in three parts, of which small multiples of the first two are exact
_QUARTER = tl.constexpr(1.5703125)
_QUARTER_REST = tl.constexpr(4.837512969970703e-4)
_QUARTER_LAST = tl.constexpr(7.549789954891882e-8)
_QUARTERS = tl.constexpr(2 / math.pi)


@triton.jit
def tile_of_sample(elements, BLOCK: tl.constexpr):
    """The sample of this program, the first element of its tile, and its lanes and their mask."""
    tiles = tl.cdiv(elements, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    start = program % tiles * BLOCK
    lanes = tl.arange(0, BLOCK)
    return program // tiles, start, lanes, lanes < elements - start


@triton.jit
def run_of_lane(start, lanes, run, BLOCK: tl.constexpr):
    """Which run of its sample each element of a tile lies in."""
    # 64 bits for the tile alone; of its lanes' view, a longer run is as good as one of BLOCK
    within = tl.minimum(run, BLOCK).to(tl.int32)
    left = tl.minimum(run - start % run, BLOCK).to(tl.int32)
    return start // run + (lanes + (within - left)) // within


@triton.jit
def coefficient_at(
    batch, start, lanes, elements, run,
    PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a tile's coefficients lie: one number where it is the sample's, else one to a lane."""
    at, runs = batch, elements // run
    if not PER_SAMPLE:
        # lanes past the sample read its last
        at = batch * runs + tl.minimum(run_of_lane(start, lanes, run, BLOCK), runs - 1)
    return at


@triton.jit
def load_step(step_ptr, stream: tl.constexpr):
    """The counter's last two words, of what the step is when the kernel runs."""
    step = tl.load(step_ptr)
    return step.to(tl.uint32), ((step >> 32) * 2**8 + stream).to(tl.uint32)


@triton.jit
def noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK: tl.constexpr):
    """Normals of a tile of `tile_of_sample`."""
    x0, x1, x2, x3 = word_tile(batch, start, step_ptr, sample, key_low, key_high, _NOISE, BLOCK)
    n0, n1 = pair_of_normals(x0, x1)
    n2, n3 = pair_of_normals(x2, x3)
    return in_order(n0, n1, n2, n3, BLOCK)


@triton.jit
def word_tile(
    batch, start, step_ptr, sample, key_low, key_high,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The four words of each counter of a tile, (BLOCK / 4,) each."""
    step_low, step_high = load_step(step_ptr, STREAM)
    # unsigned, where the sum of two words of int32 would overflow
    row = sample.to(tl.uint32) + batch.to(tl.uint32)
    group = (start // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    return philox_words(
        group, row, step_low, step_high, key_low.to(tl.uint32), key_high.to(tl.uint32)
    )


@triton.jit
def in_order(n0, n1, n2, n3, BLOCK: tl.constexpr):
    """What four words of a counter gave, by element (BLOCK,)."""
    # the last dimension of a join is its pair: n0, n1, n2, n3 in this order
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """The four words of a counter, on uint32, scalars or tiles."""
    for _ in tl.static_range(_ROUNDS):
        hi0, hi1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        lo0, lo1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def pair_of_normals(x0, x1):
    u = x0.to(tl.float32) * 2.0**-32 + 2.0**-33
    r = tl.sqrt_rn(-2 * tl.log(u))
    cos, sin = cos_sin(x1.to(tl.float32) * _TURN)
    return r * cos, r * sin


@triton.jit
def cos_sin(a):
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
