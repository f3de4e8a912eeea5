"""Random numbers that are a function of what they are for, and so need not be stored.

    counter = (element // 4, sample, step mod 2**32, (step // 2**32) * 2**8 + stream)

With element < 2**34, sample < 2**32, step < 2**56 and stream < 2**8 each of the four words is below
2**32, and step and stream can be read off the last two: no two draws of a seed share a counter.
A number depends neither on how many are drawn together nor on where. Philox 4x32-10 is a bijection
of counters under the key, which is the seed:

    (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

ten times, with k0 and k1 raised by a constant after each. Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3" (SC '11). Four normals come from the four words, with every number
rounded to float32 on its way:

    r = sqrt(-2 ln(x0 / 2**32 + 2**-33)),    a = 2 pi x1 / 2**32,    n0, n1 = r cos(a), r sin(a)

and n2, n3 from x2, x3. Box & Muller 1958. No normal exceeds sqrt(66 ln 2) < 6.77.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import noise_tile
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import LANES

WORD = 2**32 - 1  # the bits of a word
NORMALS = 4  # of one counter
MAX_ELEMENTS = NORMALS * 2**32
MAX_TOKENS = 2**32  # one counter each
MAX_TILE = 4 * LANES  # 8 elements to a thread of four warps
CHUNK = 2**16  # elements of plain torch's noise: the words of its counters stay in a core's cache
LIMITS = {"seed": 2**64, "step": 2**56, "sample": 2**32}
DrawArguments = tuple[int, Tensor, int]  # as an op takes it: seed, step () int64, sample

_LEVEL = tl.constexpr(noise_tile.LEVEL)  # a kernel reads no other kind of global


# seeds


def stream_seed(*key: int) -> int:
    """Hash a key to the seed of its own stream, the same on every machine.

    Args:
        key:  integers in the range of int64, such as (seed, block, step); their order counts
    Returns:
        A seed in [0, 2**63).
    Raises:
        ValueError: a part of the key is not an integer of 64 bits.
    """
    try:
        packed = struct.pack(f"<{len(key)}q", *key)
    except struct.error as error:
        raise ValueError(f"a stream's key must be 64-bit integers, got {key}") from error
    # one bit less than the digest, so that the seed fits a signed 64-bit integer
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Start the random stream of a key.

    Args:
        device:  where the numbers will be drawn; devices draw different numbers from one seed
        key:     as for stream_seed
    Returns:
        A generator on the device, at the beginning of the key's stream.
    Raises:
        ValueError: a part of the key is not an integer of 64 bits.
    """
    return torch.Generator(device).manual_seed(stream_seed(*key))


# draws


@dataclass(frozen=True)
class Draw:
    """Names the random numbers of one step."""

    seed: int
    """Of the run, below 2**64."""
    step: int | Tensor
    """Optimizer step, below 2**56.

    A () int64 tensor, on the device of the ops that use it, is read when an op runs: a CUDA graph
    draws anew at each replay. Its value is not checked, which would wait for a GPU.
    """
    sample: int = 0
    """Index of the first sample in the step's effective batch, over micro-batches and ranks."""

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if name == "step" and isinstance(value, Tensor):
                if value.shape != () or value.dtype != torch.int64:
                    got = f"{tuple(value.shape)} {value.dtype}"
                    raise ValueError(f"step must be an integer or () torch.int64, got {got}")
                continue
            _check_integer(name, value)
            if not 0 <= value < limit:
                raise ValueError(f"{name} must be in [0, {limit}), got {value}")

    def arguments(
        self, B: int, elements: int = 1, device: torch.device | str | None = None
    ) -> DrawArguments:
        """Seed, step and sample as an op takes them, the seed as a signed integer.

        Args:
            B:         number of samples
            elements:  of each sample
            device:    of the op's tensors, on which the step is then a () int64 tensor
        Raises:
            ValueError: the draw has not that many samples left, no sample so many elements, or the
                step is a tensor on another device.
        """
        if self.sample + B > LIMITS["sample"]:
            raise ValueError(
                f"sample + B must be at most {LIMITS['sample']}, got {self.sample} + {B}"
            )
        if elements > MAX_ELEMENTS:
            raise ValueError(f"a sample must have at most {MAX_ELEMENTS} elements, got {elements}")
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        return seed, self._step_on(device), self.sample

    def nth(self, index: int) -> "Draw":
        """The draw of a part of the step, such as a layer: of a seed of its own."""
        seed = stream_seed(self.seed - 2**64 if self.seed >= 2**63 else self.seed, index)
        return Draw(seed, self.step, self.sample)

    def _step_on(self, device: torch.device | str | None) -> Tensor:
        if not isinstance(self.step, Tensor):
            # filled where it lies: nothing is copied, and no one waits
            return torch.full((), self.step, dtype=torch.int64, device=device)
        # of a tensor, because its device has an index where the name of one need not
        device = torch.empty((0,), dtype=torch.float32, device=device).device
        if self.step.device != device:
            raise ValueError(f"step must be on {device}, got {self.step.device}")
        return self.step


def _check_integer(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def counter_words(step: int | Tensor, stream: int) -> tuple:
    """The last two words of a counter: integers, or tensors where the step lies."""
    return step & WORD, (step >> 32) * 2**8 + stream


def key_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed, which may be given as a signed integer."""
    return seed & WORD, (seed >> 32) & WORD


# plain torch


def philox(c0, c1, c2, c3, k0: int, k1: int) -> tuple:
    """The four words of counters.

    Args:
        c0, c1, c2, c3:  integers, or int64 tensors that broadcast, in [0, 2**32)
        k0, k1:          low and high word of the key
    Returns:
        Four integers or int64 tensors in [0, 2**32).
    """
    for _ in range(noise_tile.ROUNDS):
        hi0, lo0 = _multiply(c0, noise_tile.MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, noise_tile.MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1, lo1, hi0 ^ c3, lo0
        c0 ^= k0
        c2 ^= k1
        k0, k1 = (k0 + noise_tile.INCREMENTS[0]) & WORD, (k1 + noise_tile.INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(x, multiplier: int) -> tuple:
    """High and low word of a product."""
    # the product less x * 2**32, because the product itself leaves the range of int64
    product = x * (multiplier - 2**32)
    hi = product >> 32
    hi += x
    product &= WORD
    return hi, product


def normals_at(group: Tensor, sample: Tensor, *words: int | Tensor) -> Tensor:
    """Normals (B, 4 G) float32 of groups (G,) of four elements and samples (B, 1), both int64."""
    words = philox(group, sample, *words)
    shape = (*words[0].shape, NORMALS)
    normals = torch.empty(shape, dtype=torch.float32, device=group.device)
    for first in (0, 2):
        r = words[first].float().mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_()
        a = words[first + 1].float().mul_(noise_tile.TURN)
        torch.mul(r, a.cos(), out=normals[..., first])
        torch.mul(r, a.sin_(), out=normals[..., first + 1])
    return normals.flatten(1)


def noise_chunks(
    draw: DrawArguments, B: int, elements: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and float32 normals, the caller's to write over, until all are done.

    They are drawn by whatever draws `normals`, whose last bits depend on it: plain torch that works
    in float64 beside compiled code has the same.
    """
    seed, step, sample = draw
    size = max(CHUNK // max(elements, 1), 1)
    for first in range(0, B, size):
        rows = slice(first, min(first + size, B))
        noise = torch.empty((rows.stop - first, elements), dtype=torch.float32, device=device)
        _forward_op(noise, seed, step, sample + first)
        for start in range(0, elements, CHUNK):
            cols = slice(start, min(start + CHUNK, elements))
            yield rows, cols, noise[:, cols]


def counter_chunks(
    draw: DrawArguments, B: int, elements: int, stream: int, device: torch.device
) -> Iterator[tuple]:
    """Rows, columns and what `philox` takes for four elements each, until all are done."""
    seed, step, sample = draw
    words = *counter_words(step, stream), *key_words(seed)
    rows = max(CHUNK // max(elements, 1), 1)
    for first in range(0, B, rows):
        last = min(first + rows, B)
        index = torch.arange(sample + first, sample + last, device=device)[:, None]
        for start in range(0, elements, CHUNK):
            end = min(start + CHUNK, elements)
            group = torch.arange(start // NORMALS, -(-end // NORMALS), device=device)
            yield slice(first, last), slice(start, end), group, index, *words


def sizes(z0: Tensor) -> tuple[int, int]:
    """B and the elements of a sample."""
    return z0.shape[0], math.prod(z0.shape[1:])


# kernels


@triton.jit(do_not_specialize=noise_tile.DRAW)
def _fwd_kernel(
    normals_ptr,  # (B, elements)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, mask = noise_tile.tile_of_sample(elements, BLOCK)
    noise = noise_tile.noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    tl.store(normals_ptr + (batch * elements + start) + lanes, noise, mask=mask)


@triton.jit(do_not_specialize=noise_tile.DRAW)
def _uniform_kernel(
    uniforms_ptr,  # (B, T)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    B, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step_low, step_high = noise_tile.load_step(step_ptr, _LEVEL)
    x0, x1, _, _ = noise_tile.philox_words(
        (at % T).to(tl.uint32), sample.to(tl.uint32) + (at // T).to(tl.uint32), step_low, step_high,
        key_low.to(tl.uint32), key_high.to(tl.uint32),
    )  # fmt: skip
    bits = (x0 >> 5).to(tl.int64) * 2**26 + (x1 >> 6).to(tl.int64)
    tl.store(uniforms_ptr + at, (bits.to(tl.float64) + 0.5) * 2.0**-53, mask=at // T < B)


# launchers: they write into tensors of their caller


def kernel_draw(draw: DrawArguments) -> tuple[Tensor, int, int, int]:
    """What DRAW names; the words always of int32, so that one binary serves all."""
    seed, step, sample = draw
    words = (word - 2**32 if word >= 2**31 else word for word in (sample, *key_words(seed)))
    first, low, high = words
    return step, first, low, high


def noise_launch(B: int, elements: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, one program to a tile, and its options."""
    BLOCK = min(MAX_TILE, max(triton.next_power_of_2(elements), LANES // 2))
    grid = (B * triton.cdiv(elements, BLOCK),)
    return grid, {"BLOCK": BLOCK, "num_warps": max(BLOCK // LANES, 1)}


def _forward_triton(normals, *draw):
    B, elements = normals.shape
    grid, options = noise_launch(B, elements)
    _fwd_kernel[grid](normals, *kernel_draw(draw), elements, **options)


def _forward_torch(normals, *draw):
    stream, device = noise_tile.NOISE, normals.device
    for rows, cols, *counter in counter_chunks(draw, *normals.shape, stream, device):
        normals[rows, cols] = normals_at(*counter)[:, : cols.stop - cols.start]


def _uniform_triton(uniforms, *draw):
    grid, options = (triton.cdiv(uniforms.numel(), LANES),), {"num_warps": LANES // 32}
    _uniform_kernel[grid](uniforms, *kernel_draw(draw), *uniforms.shape, BLOCK=LANES, **options)


def _uniform_torch(uniforms, seed, step, sample):
    B, T = uniforms.shape
    c0 = torch.arange(T, device=uniforms.device)
    c1 = torch.arange(sample, sample + B, device=uniforms.device)[:, None]
    x0, x1, _, _ = philox(c0, c1, *counter_words(step, noise_tile.LEVEL), *key_words(seed))
    bits = (x0 >> 5) * 2**26 + (x1 >> 6)
    uniforms.copy_((bits.double() + 0.5) * 2.0**-53)


# neither a compiled graph nor one of CUDA makes a constant of a step
_DRAW = "SymInt seed, Tensor step, SymInt sample"
_forward_op = register(
    f"philox_normal(Tensor(a!) normals, {_DRAW}) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_uniform_op = register(
    f"philox_uniform(Tensor(a!) uniforms, {_DRAW}) -> ()",
    triton=_uniform_triton,
    torch_=_uniform_torch,
)


# public


def normals(draw: Draw, B: int, elements: int, device: torch.device | str | None = None) -> Tensor:
    """The noise that `add_noise` and `score_loss` use, for whoever wants to look at it.

    Args:
        draw:      names it
        B:         number of samples
        elements:  of each sample
        device:    of the result; its logarithm and cosine are its own, as compiled code's, Triton's
                   and plain torch's are, so a number may differ by 6e-7 of its pair's length
    Returns:
        (B, elements) float32, the noise of every op on that device, in float64 too.
    Raises:
        ValueError: the draw has not that many samples or elements, or its step is elsewhere.
    """
    arguments = draw.arguments(B, elements, device)
    noise = torch.empty((B, elements), dtype=torch.float32, device=device)
    _forward_op(noise, *arguments)
    return noise


def uniforms(
    draw: Draw, B: int, T: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """One uniform number for each sample or for each token, independent of the noise.

    Args:
        draw:    names them
        B:       number of samples
        T:       tokens of a sample; None is one number for the sample, which is that of token 0
        device:  of the result; it does not change a bit
    Returns:
        (B,) or (B, T) float64 in (0, 1], multiples of 2**-54.
    Raises:
        ValueError: the draw has not that many samples, T is no integer in [0, 2**32], or the
            draw's step is elsewhere.
    """
    if T is not None:
        _check_integer("T", T)
        if not 0 <= T <= MAX_TOKENS:
            raise ValueError(f"T must be in [0, {MAX_TOKENS}], got {T}")
    arguments = draw.arguments(B, device=device)
    numbers = torch.empty((B, 1 if T is None else T), dtype=torch.float64, device=device)
    _uniform_op(numbers, *arguments)
    return numbers[:, 0] if T is None else numbers
