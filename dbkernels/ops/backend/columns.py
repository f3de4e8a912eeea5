"""How (N, F) is cut for ops that work element by element and have one bias per column.

A program owns BLOCK_F columns and walks down its share of the rows. A thread keeps its columns, so
sums over rows stay in its registers until the end.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._norm import statistics_dtype
from dbkernels.ops.backend.sums import Segments, partial_sums
from dbkernels.ops.backend.tile import LANES, tiles_per_program

CHUNK = 2**17  # elements of plain torch's temporaries, times threads: a core's cache holds four


@dataclass(frozen=True)
class ColumnTile:
    """The tile of a kernel that works on columns, BLOCK_N rows at a time."""

    BLOCK_N: int
    BLOCK_F: int
    num_warps: int


@dataclass(frozen=True)
class Share:
    """How a kernel takes its rows."""

    rows: int
    """Loaded together by a thread, so that it waits for memory less often."""
    registers: int
    """Of a thread; the compiler is held to them, and what it makes does not spill."""


def column_tile(F: int, share: Share) -> ColumnTile:
    """The tile with the fewest idle lanes; among equals, the widest."""
    warps = min((1, 2, 4), key=lambda warps: (triton.cdiv(F, LANES * warps) * warps, -warps))
    return ColumnTile(BLOCK_N=share.rows, BLOCK_F=LANES * warps, num_warps=warps)


def rows_per_column_tile(
    N: int, F: int, tile: ColumnTile, share: Share, device: torch.device
) -> int:
    """Rows of one program."""
    tiles, column_tiles = triton.cdiv(N, tile.BLOCK_N), triton.cdiv(F, tile.BLOCK_F)
    each = tiles_per_program(tiles, share.registers, tile.num_warps, device, beside=column_tiles)
    return each * tile.BLOCK_N


def launch_forward(kernel, share: Share, h: Tensor, bias: Tensor | None, u: Tensor) -> None:
    N, F = u.shape
    tile = column_tile(F, share)
    rows = rows_per_column_tile(N, F, tile, share, h.device)
    grid = (triton.cdiv(F, tile.BLOCK_F), triton.cdiv(N, rows))
    kernel[grid](h, bias, u, N, F, rows, **asdict(tile), maxnreg=share.registers)


def launch_backward(
    kernel,
    share: Share,
    h: Tensor,
    du: Tensor,
    bias: Tensor | None,
    dh: Tensor,
    u: Tensor | None,
    dbias: Tensor | None,
) -> None:
    N, F = du.shape
    tile = column_tile(F, share)
    rows = rows_per_column_tile(N, F, tile, share, h.device)
    grid = (triton.cdiv(F, tile.BLOCK_F), triton.cdiv(N, rows))
    options = {**asdict(tile), "maxnreg": share.registers}
    if dbias is None or grid[1] == 1:
        kernel[grid](h, du, bias, dh, u, dbias, N, F, rows, **options)
        return
    with partial_sums(Segments(N, rows, grid[1]), dbias[None]) as (sums,):
        kernel[grid](h, du, bias, dh, u, sums, N, F, rows, **options)


@triton.jit
def columns(N, F, rows_per_program, BLOCK_F: tl.constexpr):
    """The columns of a program (1, BLOCK_F), its first row, and the row after its last."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    return cols, first, tl.minimum(first + rows_per_program, N)


@triton.jit
def load_bias(bias_ptr, cols, mask):
    """float32 (1, BLOCK_F); 0 without a bias, where bias_ptr is None."""
    bias = tl.zeros(cols.shape, tl.float32)
    if bias_ptr is not None:
        bias = load_tile(bias_ptr + cols, mask)
    return bias


@triton.jit
def load_tile(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


def chunks(scratch: int, h: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """The same few rows of h and of each other tensor, then `scratch` tensors like those of h.

    The scratch is in at least float32 and the same for all chunks, so it stays in the cache.
    """
    rows = min(max(CHUNK * torch.get_num_threads() // h.shape[1], 1), h.shape[0])
    buffers = h.new_empty(scratch, rows, h.shape[1], dtype=statistics_dtype(h))
    for start in range(0, h.shape[0], rows):
        views = [t if t is None else t[start : start + rows] for t in (h, *others)]
        yield *views, *buffers[:, : len(views[0])]


def add_bias(h: Tensor, bias: Tensor | None, x: Tensor) -> None:
    """x = h + bias in the dtype of x; never h itself, which its gradient may overwrite."""
    if bias is not None and h.dtype == x.dtype:
        torch.add(h, bias, out=x)
        return
    x.copy_(h)
    if bias is not None:
        x += bias


def same_dtype(out: Tensor, scratch: Tensor) -> Tensor:
    """Where to compute what goes into `out` in the dtype of `scratch`: in place where possible."""
    return out if out.dtype == scratch.dtype else scratch


def check_bias(bias: Tensor | None, name: str, width: int) -> None:
    """One element to a column of h; `name` is how the op calls that many."""
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias must be ({name},) = ({width},), got {tuple(bias.shape)}")
