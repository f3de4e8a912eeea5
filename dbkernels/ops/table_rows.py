"""Rows of a table, as they are or at unit length, and the gradient of the table.

    y[n] = w[index[n]],    or with unit    y[n] = w_hat[index[n]],    w_hat = w / max(|w|, EPS)

Backward, with the sum over the tokens of a row, and for unit rows the gradient of their length once
for each row of the table and not for each token:

    G[v]  = sum_{n: index[n] = v} dy[n]
    dw[v] = G[v],    or with unit    dw[v] = (G[v] - w_hat[v] (w_hat[v] . G[v])) / max(|w[v]|, EPS)

without the second term where |w| < EPS.

Words are as frequent as Zipf's law says, so one program for each row of the table would leave one
of them a share of all tokens. Tokens are sorted by their row instead, and a program adds up RUN of
them: rows that begin and end in its run are then done. What a run has of another row is a partial
sum, and the program in whose run such a row begins adds its partial sums up, in their order. There
are no atomics, so every run gives the same bits; and no shape depends on an index, so nobody waits
for a GPU.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks, tile
from dbkernels.ops.backend.register import register

EPS = 1e-12  # the least length that a row is divided by, as in torch.nn.functional.normalize
RUN = 32  # tokens of a program: few enough that a batch has programs for every processor
# of a thread of the backward, by the elements of a piece: without a limit the compiler spills some
# of them so that more programs fit
REGISTERS = {4: 64, 8: 128}
SUM_WARPS = 16  # of a program that adds partial sums, at least: one may have those of many tokens

# kernels


@triton.jit
def _dot(a, b, PIECES: tl.constexpr):
    """Of each row, (BLOCK_T, 1); lanes past D must hold 0."""
    total = a[0] * b[0]
    for piece in tl.static_range(1, PIECES):
        total += a[piece] * b[piece]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def _inverse_length(rows, eps, PIECES: tl.constexpr):
    """The length of each row (BLOCK_T, 1), and 1 over it or over eps."""
    length = tl.sqrt(_dot(rows, rows, PIECES))
    # a row that has a NaN is one, as in torch
    return length, 1 / tl.maximum(length, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale_rows(rows, factor, PIECES: tl.constexpr):
    scaled = ()
    for piece in tl.static_range(PIECES):
        scaled += (rows[piece] * factor,)
    return scaled


@triton.jit
def _zero_rows(BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    rows = ()
    for _ in tl.static_range(PIECES):
        rows += (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    return rows


@triton.jit
def _zero_where(condition, rows, PIECES: tl.constexpr):
    kept = ()
    for piece in tl.static_range(PIECES):
        kept += (tl.where(condition, 0.0, rows[piece]),)
    return kept


@triton.jit
def _store_gradient(
    total, table_ptr, dtable_ptr, row, mask, V, D, eps,
    BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """That of a row, whose sum is complete; a row that the table does not have gets none."""
    row = tl.where(mask, row, -1)
    known = (row >= 0) & (row < V)
    if table_ptr is not None:
        w = tile.load_row(table_ptr, row * D, known, D, BLOCK_D, PIECES)
        length, inverse = _inverse_length(w, eps, PIECES)
        # rows that are not stored would be too large for the dtype of the table
        inverse = tl.where(known, inverse, 0.0)
        w_hat = _scale_rows(w, inverse, PIECES)
        along = tl.where(length >= eps, _dot(w_hat, total, PIECES), 0.0)
        across = tile.add_rows(total, _scale_rows(w_hat, -along, PIECES), PIECES)
        total = _scale_rows(across, inverse, PIECES)
    tile.store_row(dtable_ptr, row * D, known, total, D, BLOCK_D, PIECES)


@triton.jit(do_not_specialize=["N"])
def _fwd_kernel(
    index_ptr, table_ptr,  # (N,), (V, D)
    y_ptr,                 # (N, D)
    N, V, D, eps,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    mask = token < N
    row = tl.load(index_ptr + token, mask=mask, other=0)
    known = (row >= 0) & (row < V)
    w = tile.load_row(table_ptr, row * D, mask & known, D, BLOCK_D, PIECES)

    factor = tl.where(known, 1.0, float("nan"))
    if UNIT:
        factor *= _inverse_length(w, eps, PIECES)[1]
    y = _scale_rows(w, factor, PIECES)

    tile.store_row(y_ptr, token * D, mask, y, D, BLOCK_D, PIECES)


@triton.jit(do_not_specialize=["N"])
def _bwd_kernel(
    dy_ptr, table_ptr, rows_ptr, tokens_ptr,  # (N, D), (V, D), (N,) twice
    dtable_ptr, parts_ptr,                    # (V, D), (runs, 2, D)
    N, V, D, eps,
    RUN: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    first = run * RUN
    last = tl.minimum(first + RUN, N)

    before = tl.load(rows_ptr + first - 1, mask=first > 0, other=0)
    has_begun = (first > 0) & (before == tl.load(rows_ptr + first))  # in a run before this one
    total, whole = _zero_rows(1, BLOCK_D, PIECES), tl.full((1, 1), 1, tl.int1)
    for at in range(first, last):
        row, token = tl.load(rows_ptr + at), tl.load(tokens_ptr + at)
        dy = tile.load_row(dy_ptr, token * D, whole, D, BLOCK_D, PIECES)
        total = tile.add_rows(total, dy, PIECES)

        after = tl.load(rows_ptr + at + 1, mask=at + 1 < N, other=0)
        ends = (at + 1 == N) | (after != row)
        is_part = has_begun | (ends == 0)
        if ends & (has_begun == 0):
            _store_gradient(total, table_ptr, dtable_ptr, row, whole, V, D, eps, BLOCK_D, PIECES)
        if is_part & (ends | (at + 1 == last)):
            # first what the run before has left, then what this run leaves to the next
            part = 2 * run + tl.where(has_begun, 0, 1)
            tile.store_row(parts_ptr, part * D, whole, total, D, BLOCK_D, PIECES)
        has_begun &= ends == 0
        total = _zero_where(ends, total, PIECES)


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(
    parts_ptr, table_ptr, rows_ptr,  # (runs, 2, D), (V, D), (N,)
    dtable_ptr,                      # (V, D)
    N, V, D, eps,
    RUN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    first, last = run * RUN, (run + 1) * RUN
    row, after = tl.load(rows_ptr + last - 1), tl.load(rows_ptr + last)
    before = tl.load(rows_ptr + first - 1, mask=first > 0, other=0)

    if (after == row) & ((first == 0) | (before != row)):
        total = _zero_rows(BLOCK_T, BLOCK_D, PIECES)
        later, is_unfinished = tl.arange(0, BLOCK_T)[:, None].to(tl.int64), row == row
        while is_unfinished:
            at = (run + later) * RUN
            goes_on = tl.load(rows_ptr + at, mask=(later > 0) & (at < N), other=0) == row
            mask = (later == 0) | ((at < N) & goes_on)
            part = 2 * (run + later) + tl.where(later == 0, 1, 0)
            parts = tile.load_row(parts_ptr, part * D, mask, D, BLOCK_D, PIECES)
            total = tile.add_rows(total, parts, PIECES)
            later += BLOCK_T
            is_unfinished = tl.min(tl.min(mask.to(tl.int32), axis=0), axis=0) > 0
        sums = ()
        for piece in tl.static_range(PIECES):
            # in each row of the tile, so that its threads still store vectors
            of_all = tl.sum(total[piece], axis=0)[None, :]
            sums += (tl.broadcast_to(of_all, (BLOCK_T, BLOCK_D)),)
        first_row = tl.arange(0, BLOCK_T)[:, None] == 0
        _store_gradient(sums, table_ptr, dtable_ptr, row, first_row, V, D, eps, BLOCK_D, PIECES)


# launchers: they write into tensors of their caller


def _forward_triton(index, table, unit, y):
    (N,), (V, D) = index.shape, table.shape
    options = tile.row_tile(D)._asdict()
    grid = (triton.cdiv(N, options["BLOCK_T"]),)
    _fwd_kernel[grid](index, table, y, N, V, D, EPS, UNIT=unit, **options)


def _forward_torch(index, table, unit, y):
    known = (index >= 0) & (index < len(table))
    rows = table[index.where(known, 0)]
    if unit:
        rows = F.normalize(rows.to(checks.statistics_dtype(rows)), dim=-1, eps=EPS)
    y.copy_(rows.masked_fill_(~known[:, None], math.nan))


def _backward_triton(dy, table, rows, tokens, dtable):
    (N, D), V = dy.shape, len(dtable)
    of_all = tile.row_tile(D)
    warps = of_all.num_warps // of_all.BLOCK_T
    options = {"RUN": RUN, "BLOCK_D": of_all.BLOCK_D, "PIECES": of_all.PIECES}
    limit = min(REGISTERS[of_all.shape[0]], tile.REGISTERS // (tile.WARP * warps))
    runs, together = triton.cdiv(N, RUN), max(SUM_WARPS // warps, 1)
    parts = torch.empty((runs, 2, D), dtype=torch.float32, device=dy.device)
    dtable.zero_()
    _bwd_kernel[(runs,)](
        dy, table, rows, tokens, dtable, parts, N, V, D, EPS,
        num_warps=warps, maxnreg=limit, **options,
    )  # fmt: skip
    if runs > 1:
        _sum_kernel[(runs - 1,)](
            parts, table, rows, dtable, N, V, D, EPS,
            BLOCK_T=together, num_warps=together * warps, **options,
        )  # fmt: skip


def _backward_torch(dy, table, rows, tokens, dtable):
    wide = checks.statistics_dtype(dy)
    rows, segment = rows.unique_consecutive(return_inverse=True)
    known = (rows >= 0) & (rows < len(dtable))
    # an index_add_ would use atomics on a GPU
    add_segments = torch.ops.aten.embedding_dense_backward
    total = add_segments(dy[tokens].to(wide), segment, len(rows), -1, False)[known]
    rows = rows[known]
    if table is not None:
        w = table[rows].to(wide)
        length = w.norm(dim=-1, keepdim=True)
        clamped = length.clamp_min(EPS)
        w_hat = w / clamped
        along = (w_hat * total).sum(-1, keepdim=True).where(length >= EPS, 0)
        total = (total - along * w_hat) / clamped
    dtable.zero_()[rows] = total.to(dtable.dtype)


def _check_index(index, table, unit, y):
    for row in map(int, index.aminmax()):
        if not 0 <= row < len(table):
            raise ValueError(f"index must be 0 to {len(table) - 1}, got {row}")


# An index that is no row of the table is a ValueError on a CPU; elsewhere, where to look at it
# would wait for the device, its row is NaN, and the gradient of the table leaves it out
_forward_op = register(
    "table_rows_fwd(Tensor index, Tensor table, bool unit, Tensor(a!) y) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
    check=_check_index,
)
# tokens (N,) are sorted by their rows (N,); table is that of unit rows, and None of others
_backward_op = register(
    "table_rows_bwd(Tensor dy, Tensor? table, Tensor rows, Tensor tokens, Tensor(a!) dtable) -> ()",
    triton=_backward_triton,
    torch_=_backward_torch,
    scratch=lambda dy, *_: 2 * triton.cdiv(len(dy), RUN) * dy.shape[1],
)


# autograd


class _TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index, unit):
        y = table.new_empty((len(index), table.shape[1]))
        _forward_op(index, table, unit, y)
        ctx.save_for_backward(index, table if unit else None)
        ctx.shape = table.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("table_rows")
        index, table = ctx.saved_tensors
        # stable, or the order of a row's tokens and so the last bits could differ between runs
        rows, tokens = index.sort(stable=True)
        dtable = dy.new_empty(ctx.shape)
        _backward_op(dy.contiguous(), table, rows, tokens, dtable)
        return dtable, None, None


# public


def table_rows(table: Tensor, index: Tensor, *, unit: bool = False) -> Tensor:
    """Look up rows of a table, such as the embeddings of words.

    The gradient of the table has the same bits every run.

    Args:
        table:  (V, D)  float32, bfloat16 or float16, on a CPU also float64
        index:  (...)   int64, each 0 to V - 1. On a GPU another one is not an error, which would
                wait for the device: its row is NaN, and no gradient comes of it
        unit:   divide each row by its length, as `torch.nn.functional.normalize` does, which leaves
                a row of 0 as it is; the rest of the table is never normalised
    Returns:
        (..., D), dtype of table. Lengths and sums are float32 inside, or float64 for float64.
    Raises:
        ValueError: a shape, dtype, device or index disagrees, or D > MAX_D.
        RuntimeError: the gradient is differentiated.
    """
    _check(table, index)
    rows = _TableRows.apply(table.contiguous(), index.reshape(-1).contiguous(), unit)
    return rows.view(*index.shape, table.shape[1])


def _check(table, index):
    checks.check_floats(table=table)
    if table.dim() != 2 or not table.numel() or table.shape[1] > tile.MAX_D:
        raise ValueError(
            f"table must be (V, D) with V at least 1 and D 1 to {tile.MAX_D}, "
            f"got {tuple(table.shape)}"
        )
    if index.dtype != torch.int64 or index.device != table.device:
        raise ValueError(
            f"index must be int64 on {table.device}, got {index.dtype} on {index.device}"
        )
