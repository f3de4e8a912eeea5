"""How the noise of a draw is laid over the samples of a tensor, tile by tile and never as a whole.

A tensor (B, ...) is B rows of `elements`; a tile lies in one row and starts at a multiple of 4, so
that no counter is shared by two tiles.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._philox import NORMALS, WORD, normal_tile, normals_at
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.tile import LANES

NOISE, SIGMA = 0, 1  # streams: independent numbers of one step and sample
MAX_ELEMENTS = NORMALS * 2**32
MAX_TILE = 4 * LANES  # 8 elements to a thread of four warps
CHUNK = 2**16  # elements of plain torch's noise: the words of its counters stay in a core's cache
DRAW = ("step_ptr", "sample", "key_low", "key_high")  # a draw as a kernel takes it
DrawArguments = tuple[int, Tensor, int]  # as an op takes it: seed, step () int64, sample

_NOISE = tl.constexpr(NOISE)  # a kernel reads no other kind of global


def counter_words(step: int | Tensor, stream: int) -> tuple:
    """The last two words of a counter: integers, or tensors where the step lies."""
    return step & WORD, (step >> 32) * 2**8 + stream


def key_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed, which may be given as a signed integer."""
    return seed & WORD, (seed >> 32) & WORD


def kernel_draw(draw: DrawArguments) -> tuple[Tensor, int, int, int]:
    """What DRAW names; the words always of int32, so that one binary serves all."""
    seed, step, sample = draw
    words = (word - 2**32 if word >= 2**31 else word for word in (sample, *key_words(seed)))
    return step, *words


def noise_launch(B: int, elements: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, one program to a tile, and its options."""
    BLOCK = min(MAX_TILE, max(triton.next_power_of_2(elements), LANES // 2))
    grid = (B * triton.cdiv(elements, BLOCK),)
    return grid, {"BLOCK": BLOCK, "num_warps": max(BLOCK // LANES, 1)}


@triton.jit
def tile_of_sample(elements, BLOCK: tl.constexpr):
    """The sample of this program, the first element of its tile, and its lanes and their mask."""
    tiles = tl.cdiv(elements, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    start = program % tiles * BLOCK
    lanes = tl.arange(0, BLOCK)
    return program // tiles, start, lanes, lanes < elements - start


@triton.jit
def load_step(step_ptr, stream: tl.constexpr):
    """`counter_words`, of what the step is when the kernel runs."""
    step = tl.load(step_ptr)
    return step.to(tl.uint32), ((step >> 32) * 2**8 + stream).to(tl.uint32)


@triton.jit
def noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK: tl.constexpr):
    """Normals of a tile of `tile_of_sample`."""
    step_low, step_high = load_step(step_ptr, _NOISE)
    # unsigned, where the sum of two words of int32 would overflow
    row = sample.to(tl.uint32) + batch.to(tl.uint32)
    return normal_tile(start, row, step_low, step_high, key_low, key_high, BLOCK)


@triton.jit
def load_level(sigma_ptr, batch):
    """sigma of a sample; NaN where it is no level, which nobody looks at on a GPU."""
    sigma = tl.load(sigma_ptr + batch)
    return tl.where((sigma > 0) & (sigma < float("inf")), sigma, float("nan"))


def check_levels(sigma: Tensor) -> None:
    """Each a positive number."""
    wrong = sigma[~((sigma > 0) & (sigma < math.inf))]
    if len(wrong):
        raise ValueError(f"sigma must be positive and finite, got {wrong[0].item()}")


def noise_chunks(
    draw: DrawArguments, B: int, elements: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and float32 normals, the caller's to write over, until all are done."""
    seed, step, sample = draw
    words = counter_words(step, NOISE), key_words(seed)
    rows = max(CHUNK // max(elements, 1), 1)
    for first in range(0, B, rows):
        last = min(first + rows, B)
        index = torch.arange(sample + first, sample + last, device=device)[:, None]
        for start in range(0, elements, CHUNK):
            end = min(start + CHUNK, elements)
            group = torch.arange(start // NORMALS, -(-end // NORMALS), device=device)
            normals = normals_at(index, group, *words)[:, : end - start]
            yield slice(first, last), slice(start, end), normals


def sizes(z0: Tensor) -> tuple[int, int]:
    """B and the elements of a sample."""
    return z0.shape[0], math.prod(z0.shape[1:])


def check_noise(name: str, z0: Tensor, sigma: Tensor, sigma_data: float) -> None:
    """(B, ...) with a level for each sample, and no more elements than there are counters."""
    if z0.dim() == 0:
        raise ValueError(f"{name} must be (B, ...), got a scalar")
    checks.check_floats(**{name: z0})
    if sigma.shape != z0.shape[:1] or sigma.dtype != torch.float32 or sigma.device != z0.device:
        raise ValueError(
            f"sigma must be ({z0.shape[0]},) torch.float32 on {z0.device}, "
            f"got {tuple(sigma.shape)} {sigma.dtype} on {sigma.device}"
        )
    if sigma.requires_grad:
        raise ValueError("sigma must not require a gradient, because it is given none")
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
