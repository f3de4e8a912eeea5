"""Sums that several programs share: each writes its own part, and one launch adds the parts up.

A program holds rows of one sample, or runs of rows of several; a run within a sample is a segment,
and has a row of each sum for itself. No atomics: every run of a kernel gives the same bits.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend.tile import Registers, RowLaunch, row_launch

MOST = 3  # sums of one kernel
BLOCK_D = 128  # columns of a program, one 16-byte load to a thread of a warp
BLOCK_S = 16  # segments that are loaded together


@triton.jit
def segment(batch, samples_are_shared):
    """The row of this program's sums of a sample; the sample itself where no program shares it.

    From one segment to the next either the program or the sample goes on, so no two have one row.
    """
    return batch + tl.program_id(0) * samples_are_shared


@triton.jit
def _sum_kernel(
    parts_ptr, out0_ptr, out1_ptr, out2_ptr,  # (sums, segments, D), (B, D) each
    T, D, stride, rows_per_program, segments,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    first = batch * T // rows_per_program + batch
    last = ((batch + 1) * T - 1) // rows_per_program + batch
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    out, size = batch * stride + cols, segments.to(tl.int64) * D

    _sum_rows(out0_ptr, out, parts_ptr, first, last, cols, D, BLOCK_S, BLOCK_D)
    _sum_rows(out1_ptr, out, parts_ptr + size, first, last, cols, D, BLOCK_S, BLOCK_D)
    _sum_rows(out2_ptr, out, parts_ptr + 2 * size, first, last, cols, D, BLOCK_S, BLOCK_D)


@triton.jit
def _sum_rows(
    out_ptr, out, ptr, first, last, cols, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Of rows first to last, where somebody asks for them."""
    if out_ptr is not None:
        total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        for start in range(first, last + 1, BLOCK_S):
            row = start + tl.arange(0, BLOCK_S)[:, None]
            total += tl.load(ptr + row * D + cols, mask=(row <= last) & (cols < D), other=0.0)
        tl.store(out_ptr + out, tl.sum(total, axis=0)[None, :], mask=cols < D)


@contextmanager
def partial_sums(*outs: Tensor, T: int, rows: int, segments: int) -> Iterator[list[Tensor]]:
    """Where segments write their sums (segments, D) each; added into outs (B, D) at the end.

    Args:
        outs:      of equal strides, each written in its own dtype
        T:         rows of a sample
        rows:      of a program
        segments:  of all samples
    """
    B, D = outs[0].shape
    parts = torch.empty((len(outs), segments, D), dtype=torch.float32, device=outs[0].device)
    yield list(parts)
    grid = B, triton.cdiv(D, BLOCK_D)
    _sum_kernel[grid](
        parts, *outs, *(None for _ in range(MOST - len(outs))),
        T, D, outs[0].stride(0), rows, segments, BLOCK_S, BLOCK_D,
    )  # fmt: skip


def sums_of_samples(launch: RowLaunch, T: int, *outs: Tensor) -> AbstractContextManager:
    """Where the programs of a launch write the sums of samples, outs (B, D) themselves if alone."""
    if not launch.samples_are_shared:
        return nullcontext(outs)
    return partial_sums(*outs, T=T, rows=launch.rows, segments=launch.segments(len(outs[0])))


def sums_of_all(rows: int, rows_per_program: int, *outs: Tensor | None) -> AbstractContextManager:
    """Where programs write sums over all rows, outs (D,) themselves if one program has them.

    None is a sum that nobody asked for, and then there is none.
    """
    programs = triton.cdiv(rows, rows_per_program)
    if programs == 1 or outs[0] is None:
        return nullcontext(outs)
    each = (out[None] for out in outs)
    return partial_sums(*each, T=rows, rows=rows_per_program, segments=programs)


# elements of partial sums that a launch allocates; 0 where programs write the outputs themselves


def scratch_of_samples(x: Tensor, registers: Registers, sums: int) -> int:
    """Of `sums_of_samples`, in the launch over x (B, T, D)."""
    launch = row_launch(x, registers)
    return launch.samples_are_shared * sums * launch.segments(len(x)) * x.shape[-1]


def scratch_of_all(programs: int, *outs: Tensor | None) -> int:
    """Of `sums_of_all`."""
    return 0 if programs == 1 else programs * sum(out.numel() for out in outs if out is not None)
