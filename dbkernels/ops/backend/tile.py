"""How rows of D elements are cut into tiles, and how a tile is loaded, summed and stored.

A row is a tuple of PIECES tiles of BLOCK_D lanes, so that D need not be near a power of two; a tile
holds BLOCK_T rows, one to each group of warps. One warp works on a row of up to 384 elements, and
so without a barrier.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend.register import dry_run_processors

MAX_D = 16384  # a row lives in the registers of one program
WARP = 32  # threads
REGISTERS = 65536  # of one streaming multiprocessor
# elements of one piece to a thread: 8 bytes of bfloat16, of which a warp's are two whole lines of
# memory; with 16 bytes a thread would hold twice the row, and half the programs would fit
VECTOR = 4
WARPS = 4  # of one program, where a row does not need more
MAX_WARPS = 32  # of one program
MAX_PIECES = 3  # more would leave a backward too few programs to a processor
NARROW = 8 * WARP * VECTOR * MAX_PIECES  # the widest row of 8 warps
LANES = 256  # of one warp that moves 16 bytes of bfloat16 to a thread
# arguments of kernels that differ from batch to batch: none is worth a compilation of its own
SHARED_OUT = ["rows", "T", "samples_are_shared", "rows_per_program"]
Registers = dict[tuple[int, int], int]  # of a thread, by RowTile.shape, of one row to a program
OF_MORE_ROWS = 16  # registers on top: each thread then has an address and a mask of its own


class RowTile(NamedTuple):
    """The tile of a kernel that works on whole rows."""

    BLOCK_T: int
    BLOCK_D: int
    PIECES: int
    num_warps: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of a row's share of a thread: elements of a piece, and pieces."""
        return self.BLOCK_T * self.BLOCK_D // (WARP * self.num_warps), self.PIECES


def row_tile(D: int) -> RowTile:
    """The tile with the fewest warps to a row that hold it in few pieces."""
    if D > NARROW:
        # one wide piece takes fewer registers than two of half the width, and 8 warps leave a
        # thread all that it can address
        warps = 16 if D <= 16 * LANES else 8 if D <= 8 * LANES * MAX_PIECES else MAX_WARPS
        return RowTile(1, warps * LANES, triton.cdiv(D, warps * LANES), warps)
    warps = 1
    while triton.cdiv(D, WARP * VECTOR * warps) > MAX_PIECES:
        warps *= 2
    pieces, rows = triton.cdiv(D, WARP * VECTOR * warps), max(WARPS // warps, 1)
    return RowTile(rows, WARP * VECTOR * warps, pieces, num_warps=warps * rows)


class RowLaunch(NamedTuple):
    """How the B * T rows of x (B, T, D) are shared out, in their order, over the samples' ends."""

    tile: RowTile
    registers: int
    """Of a thread, at most."""
    programs: int
    rows: int
    """Of a program, whole tiles."""
    samples_are_shared: int
    """1 where two programs may hold rows of one sample, else 0."""

    @property
    def options(self) -> dict[str, int]:
        """Of the launch; with its registers limited, so many programs fit as were counted on."""
        return {**self.tile._asdict(), "maxnreg": self.registers}

    def segments(self, B: int) -> int:
        """Runs of rows of one sample in one program, which have sums of their own, at most."""
        return B + self.samples_are_shared * (self.programs - 1)


def row_launch(x: Tensor, registers: Registers) -> RowLaunch:
    """One wave of programs that give every processor as much to do.

    Args:
        x:          (B, T, D)
        registers:  of the kernel
    """
    B, T, D = x.shape
    tile = row_tile(D)
    needed = registers[tile.shape] + (OF_MORE_ROWS if tile.BLOCK_T > 1 else 0)
    limit = min(needed, REGISTERS // (WARP * tile.num_warps))
    tiles = triton.cdiv(B * T, tile.BLOCK_T)
    rows = tiles_per_program(tiles, limit, tile.num_warps, x.device) * tile.BLOCK_T
    return RowLaunch(tile, limit, triton.cdiv(B * T, rows), rows, int(rows % T > 0))


class Share(NamedTuple):
    """What one direction of an activation takes."""

    rows: int  # that a thread loads together, so that it waits for memory less often
    registers: int  # of a thread; the compiler is held to them, and what it makes does not spill
    scratch: int  # tensors of plain torch, beside the sum of h and bias and its gradient


def column_launch(u: Tensor, share: Share) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid of one wave over u (N, F), by columns and rows, rows of a program, and options."""
    N, F = u.shape
    # the tile with the fewest idle lanes; among equals, the widest
    warps = min((1, 2, 4), key=lambda warps: (triton.cdiv(F, LANES * warps) * warps, -warps))
    tile = {"BLOCK_N": share.rows, "BLOCK_F": LANES * warps, "num_warps": warps}
    tiles, column_tiles = triton.cdiv(N, share.rows), triton.cdiv(F, LANES * warps)
    each = tiles_per_program(tiles, share.registers, warps, u.device, beside=column_tiles)
    rows = each * share.rows
    return (column_tiles, triton.cdiv(N, rows)), rows, {**tile, "maxnreg": share.registers}


def tiles_per_program(
    tiles: int, registers: int, num_warps: int, device: torch.device, *, beside: int = 1
) -> int:
    """So many that one wave of programs holds all, and no processor has much more than another.

    Args:
        tiles:      that programs share out among themselves
        registers:  of a thread
        num_warps:  of a program
        device:     to launch on
        beside:     sets of so many tiles, each with programs of its own
    """
    count, fit = processors(device), programs_per_processor(registers, num_warps)
    found = []
    # where the tiles leave a processor's last program little to do, fewer may end earlier
    for programs in range(fit, max(fit // 2, 1) - 1, -1):
        each = triton.cdiv(tiles, max(programs * count // beside, 1))
        load = triton.cdiv(beside * triton.cdiv(tiles, each), count) * each
        found.append((load, -programs, each))
    return min(found)[-1]


def programs_per_processor(registers: int, num_warps: int) -> int:
    """How many programs fit one streaming multiprocessor, of compute capability 8.0 to 10.0.

    Args:
        registers:  of a thread
        num_warps:  of a program
    """
    of_a_warp = triton.cdiv(registers * WARP, 256) * 256  # they are given out by 256
    return min(REGISTERS // (of_a_warp * num_warps), 64 // num_warps, 32)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; one for the interpreter, which few programs suit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return dry_run_processors() or 1


@triton.jit
def rows_of_program(rows, rows_per_program):
    """The first of this program's rows, and the row after its last."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    return first, tl.minimum(first + rows_per_program, rows)


@triton.jit
def rows_of_sample(batch, first, last, T):
    """Those rows of a sample that are also of first to last: the first, and one after the last."""
    begin, end = tl.maximum(first - batch * T, 0), tl.minimum(last - batch * T, T)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def load_vector(
    ptr, start, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """One row for all rows of a tile, each of which reads it, (BLOCK_T, BLOCK_D) pieces."""
    # as one row it would have to pass through shared memory to reach the threads of the others
    rows = start + tl.zeros((BLOCK_T, 1), tl.int32)
    return load_row(ptr, rows, tl.full((BLOCK_T, 1), 1, tl.int1), D, BLOCK_D, PIECES)


@triton.jit
def store_sum(ptr, start, rows, D, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """The sum of a tile's rows, as one row."""
    row = [tl.sum(piece, axis=0)[None, :] for piece in rows]
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
def zeros_like(row):
    return [tl.zeros_like(piece) for piece in row]


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
