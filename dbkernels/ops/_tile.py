"""How rows of D elements are cut into tiles, and how a tile is loaded, summed and stored.

A row is a tuple of PIECES tiles of BLOCK_D lanes, so that D need not be near a power of two; a tile
holds BLOCK_T rows, one to each group of warps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._path import rehearsed_processors

MAX_D = 16384  # a row lives in the registers of one program
LANES = 256  # of one warp: 16 bytes of bfloat16 to each thread
WARPS = 4  # of one program, where a row does not need more
MAX_PIECES = 3  # more would spill the backward's registers


@dataclass(frozen=True)
class RowTile:
    """The tile of a kernel that works on whole rows."""

    BLOCK_T: int
    BLOCK_D: int
    PIECES: int
    num_warps: int


def row_tile(D: int) -> RowTile:
    """The tile with the fewest elements to a thread of those with at most a quarter idle lanes."""
    tiles = [(triton.cdiv(D, LANES * warps), warps) for warps in (32, 16, 8, 4, 2, 1)]
    # a width that no tile suits, such as 513, takes the one with the fewest idle lanes
    wide = [
        (LANES * warps * pieces, pieces, warps) for pieces, warps in tiles if pieces <= MAX_PIECES
    ]
    _, pieces, warps = min(wide, key=lambda tile: (max(tile[0], 4 * D // 3), tile[1]))
    rows = max(WARPS // warps, 1)
    return RowTile(rows, BLOCK_D=LANES * warps, PIECES=pieces, num_warps=warps * rows)


def row_launch(x: Tensor, programs: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid (samples, splits), the rows of a split, and the tile, for x (B, T, D)."""
    B, T, D = x.shape
    tile = row_tile(D)
    rows = rows_per_program(B, T, tile, programs, x.device)
    return (B, triton.cdiv(T, rows)), rows, asdict(tile)


def rows_per_program(B: int, T: int, tile: RowTile, programs: int, device: torch.device) -> int:
    """Rows of one sample for each program, so that `programs` to a processor share the work."""
    splits = triton.cdiv(programs * processors(device), B)
    return triton.cdiv(triton.cdiv(T, splits), tile.BLOCK_T) * tile.BLOCK_T


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; one for the interpreter, which few programs suit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return rehearsed_processors() or 1


@contextmanager
def partial_sums(splits: int, *outs: Tensor) -> Iterator[list[Tensor]]:
    """Where programs that share a sample write their sums; added into outs (B, D) at the end."""
    if splits == 1:
        yield list(outs)
        return
    B, D = outs[0].shape
    sums = [torch.empty((B, splits, D), dtype=torch.float32, device=outs[0].device) for _ in outs]
    yield sums
    for out, parts in zip(outs, sums, strict=True):
        out.copy_(parts.sum(1))


@triton.jit
def load_vector(ptr, start, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """One row for all rows of a tile, (1, BLOCK_D) pieces."""
    return load_row(ptr, start, tl.full((1, 1), 1, tl.int1), D, BLOCK_D, PIECES)


@triton.jit
def store_vector(ptr, start, row, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    store_row(ptr, start, tl.full((1, 1), 1, tl.int1), row, D, BLOCK_D, PIECES)


@triton.jit
def load_row(ptr, start, mask, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """Rows at start (BLOCK_T, 1), as float32; 0 past D and where mask (BLOCK_T, 1) is off."""
    row = ()
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        row += (tl.load(ptr + start + cols, mask=mask & (cols < D), other=0.0).to(tl.float32),)
    return row


@triton.jit
def store_row(ptr, start, mask, row, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        tl.store(ptr + start + cols, row[piece], mask=mask & (cols < D))


@triton.jit
def zero_row(BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    row = ()
    for _ in tl.static_range(PIECES):
        row += (tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32),)
    return row


@triton.jit
def add_rows(a, b, PIECES: tl.constexpr):
    row = ()
    for piece in tl.static_range(PIECES):
        row += (a[piece] + b[piece],)
    return row


@triton.jit
def mul_rows(a, b, PIECES: tl.constexpr):
    row = ()
    for piece in tl.static_range(PIECES):
        row += (a[piece] * b[piece],)
    return row


@triton.jit
def mul_add_rows(a, b, c, PIECES: tl.constexpr):
    """a * b + c."""
    row = ()
    for piece in tl.static_range(PIECES):
        row += (a[piece] * b[piece] + c[piece],)
    return row


@triton.jit
def mean_row(row, D, PIECES: tl.constexpr):
    """Mean of each row over its D elements, (BLOCK_T, 1); lanes past D must hold 0."""
    total = row[0]
    for piece in tl.static_range(1, PIECES):
        total += row[piece]
    return tl.sum(total, axis=1)[:, None] / D


@triton.jit
def sum_over_rows(rows, PIECES: tl.constexpr):
    """(BLOCK_T, BLOCK_D) tiles to (1, BLOCK_D)."""
    row = ()
    for piece in tl.static_range(PIECES):
        row += (tl.sum(rows[piece], axis=0)[None, :],)
    return row
