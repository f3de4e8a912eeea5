"""What one of the processes that save together writes, and what state.json says of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from dbkernels.training.checkpoint.shard import (
    Box,
    Parts,
    Shard,
    Tensors,
    check_shard,
    check_tiles,
    joined,
)
from dbkernels.training.tensor_file import DTYPES


class Entry(TypedDict):
    """Where the pieces of a tensor lie, as JSON has it."""

    dtype: str  # of DTYPES
    shape: list[int]  # of the whole
    boxes: list[tuple[int, int, list[int], list[int]]]  # rank and row, at and size


Pieces = dict[str, dict[str, Entry]]  # group -> name -> where its pieces lie


@dataclass(frozen=True)
class Part:
    """What one process writes, and what there is beside it."""

    tensors: Tensors  # that it writes
    whole: dict[str, set[str]]  # names by group of those that the first rank writes alone
    pieces: Pieces  # its own


def part_of(tensors: Parts, rank: int, count: int) -> Part:
    """What a process writes of what it holds.

    Args:
        tensors:  group -> name -> a tensor, or what it holds of one
        rank:     of the process
        count:    of them; one alone joins the boxes of what it holds
    Raises:
        ValueError: a tensor could not be read back as it is.
    """
    for group, named in tensors.items():
        _check_group(group, named)
    written: Tensors = {group: {} for group in tensors}
    whole: dict[str, set[str]] = {group: set() for group in tensors}
    pieces: Pieces = {group: {} for group in tensors}
    for group, named in tensors.items():
        for name, value in named.items():
            if isinstance(value, Shard) and count > 1:
                if value.boxes and value.local.numel():
                    written[group][name] = value.local
                pieces[group][name] = _entry(value, rank)
                continue
            whole[group].add(name)
            if not rank:
                written[group][name] = (
                    _alone(value, f"{group}.{name}") if isinstance(value, Shard) else value
                )
    return Part(written, whole, pieces)


def _check_group(group: str, named: Mapping[str, Tensor | Shard]) -> None:
    if not re.fullmatch("[A-Za-z0-9_-]+", group):
        raise ValueError(f"a group is named by letters, digits, _ and -, got {group!r}")
    if "__metadata__" in named:
        raise ValueError(f"{group} has a tensor named __metadata__, which the format reserves")
    for name, value in named.items():
        t = value.local if isinstance(value, Shard) else value
        if not isinstance(t, Tensor):
            raise ValueError(f"{group}.{name} must be a tensor, got {type(t).__name__}")
        if t.layout != torch.strided or t.is_meta or t.dtype not in DTYPES:
            got = f"{t.dtype}, {t.layout}, {t.device}"
            raise ValueError(f"{group}.{name} must be dense with a dtype of DTYPES, got {got}")
        if isinstance(value, Shard):
            check_shard(value, f"{group}.{name}")


def _alone(shard: Shard, name: str) -> Tensor:
    check_tiles(shard.boxes, shard.shape, name)
    if tuple(shard.local.shape) == tuple(shard.shape) and len(shard.boxes) == 1:
        return shard.local
    parts = [(box, shard.local) for box in shard.boxes]
    return joined(parts, shard.shape, shard.local.dtype)


def _entry(shard: Shard, rank: int) -> Entry:
    boxes = [(rank, box.row, [*box.at], [*box.size]) for box in shard.boxes if all(box.size)]
    return Entry(dtype=DTYPES[shard.local.dtype], shape=[*shard.shape], boxes=boxes)


def together(parts: Sequence[Part]) -> Pieces:
    """Where the pieces of every tensor lie that no rank holds whole.

    Args:
        parts:  by rank
    Raises:
        ValueError: the ranks do not agree on a tensor, or its pieces do not tile it.
    """
    every: Pieces = {}
    for rank, part in enumerate(parts):
        for group, names in part.whole.items():
            for name in sorted(names - parts[0].whole.get(group, set())):
                raise ValueError(f"{group}.{name} must be whole on rank 0 as on rank {rank}")
        for group, named in part.pieces.items():
            for name, entry in named.items():
                _add(every.setdefault(group, {}), name, entry, group)
    for group, named in every.items():
        for name, entry in named.items():
            if name in parts[0].whole.get(group, ()):
                raise ValueError(f"{group}.{name} must be whole on each rank or on none")
            boxes = [box for own in boxes_of(entry).values() for box in own]
            check_tiles(boxes, entry["shape"], f"{group}.{name}")
    return every


def _add(named: dict[str, Entry], name: str, entry: Entry, group: str) -> None:
    known = named.setdefault(name, Entry(dtype=entry["dtype"], shape=entry["shape"], boxes=[]))
    expected, got = ((tuple(each["shape"]), each["dtype"]) for each in (known, entry))
    if got != expected:
        raise ValueError(f"{group}.{name} must be {expected} on each rank, got {got}")
    known["boxes"] += entry["boxes"]


def boxes_of(entry: Entry) -> dict[int, tuple[Box, ...]]:
    """The boxes of a tensor, by rank."""
    found: dict[int, tuple[Box, ...]] = {}
    for rank, row, at, size in entry["boxes"]:
        found[rank] = (*found.get(rank, ()), Box(tuple(at), tuple(size), row))
    return found
