"""A tensor of which each process holds a part, and how its parts make the whole again.

A local tensor lies in the whole as boxes, which follow one another along its dim 0. FSDP's chunk of
rows is one box; so is a cut of dim 1, whose rows are narrower; one of the queries, keys and values
of a fused projection is three.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """Where rows of a local tensor lie in the whole."""

    at: tuple[int, ...]  # first element in the whole, by dim
    size: tuple[int, ...]  # elements, by dim; but for dim 0 those of the local tensor
    row: int  # first in dim 0 of the local tensor


@dataclass(frozen=True)
class Shard:
    """What one process holds of a tensor.

    Over all processes the boxes tile the whole. One that holds what another one saves has no box.
    """

    local: Tensor  # of as many dims as the whole; may be empty
    shape: tuple[int, ...]  # of the whole, of one dim at least
    boxes: tuple[Box, ...]  # all rows of the local tensor in their order, or none


Tensors = dict[str, dict[str, Tensor]]  # group ("model", "ema", ...) -> tensor name -> tensor
Parts = Mapping[str, Mapping[str, Tensor | Shard]]  # the same, of which some are in parts


def check_shard(shard: Shard, name: str) -> None:
    """Refuse boxes that are not the rows of the local tensor, or that reach out of the whole.

    Raises:
        ValueError: with the name.
    """
    shape, local = tuple(shard.shape), tuple(shard.local.shape)
    if not shape or len(local) != len(shape):
        raise ValueError(f"{name} must have a local tensor of the dims of {shape}, got {local}")
    row = 0
    for box in shard.boxes:
        fits = len(box.at) == len(box.size) == len(shape) and all(
            first >= 0 and size >= 0 and first + size <= whole
            for first, size, whole in zip(box.at, box.size, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name} must have boxes within {shape}, got {box}")
        if tuple(box.size[1:]) != local[1:] or box.row != row:
            raise ValueError(
                f"{name} must have a box of row {row} and as wide as {local}, got {box}"
            )
        row += box.size[0]
    if shard.boxes and row != local[0]:
        raise ValueError(f"{name} must have boxes of all rows of {local}, got {row}")


def check_tiles(boxes: Sequence[Box], shape: Sequence[int], name: str) -> None:
    """Refuse boxes that overlap or leave a hole.

    Args:
        boxes:  of all processes, each within the whole
        shape:  of the whole
        name:   of the tensor, for the message
    Raises:
        ValueError: with the name.
    """
    filled = [box for box in boxes if math.prod(box.size)]
    at = torch.tensor([box.at for box in filled], dtype=torch.int64).view(-1, len(shape))
    end = at + torch.tensor([box.size for box in filled], dtype=torch.int64).view(-1, len(shape))
    meet = ((at[:, None] < end) & (at < end[:, None])).all(-1)  # each with itself, too
    whole, found = math.prod(shape), sum(math.prod(box.size) for box in filled)
    if int(meet.sum()) > len(filled):
        raise ValueError(f"{name} must have parts that do not overlap, got some that do")
    if found != whole:
        raise ValueError(f"{name} must have parts with all its {whole} numbers, got {found}")


def joined(parts: Iterable[tuple[Box, Tensor]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The whole of boxes that tile it.

    Args:
        parts:  each box, and the local tensor that it is of
        shape:  of the whole
        dtype:  of all
    Returns:
        A tensor of the host.
    """
    whole = torch.empty(tuple(shape), dtype=dtype)
    for box, local in parts:
        there = tuple(slice(a, a + n) for a, n in zip(box.at, box.size, strict=True))
        whole[there] = local[box.row : box.row + box.size[0]]
    return whole
