"""A weight whose rows lie in several tensors, or in another order than an op's.

    whole = cat(parts)[order],    dparts = split(dwhole[argsort(order)])

An op makes the whole where it runs and again in its backward, as autocast makes its casts: for a
moment, of one layer at a time. Parameters stay as their owner named and ordered them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbkernels.ops.layer.gradients import cast, wide

Layout = tuple[int, ...]  # how many tensors of a flat list each weight has


@dataclass(frozen=True)
class Stacked:
    """One weight or bias of several tensors.

    Raises:
        ValueError: there are no parts, or one has another width, dtype or device than the first, or
            the order is not of as many rows.
    """

    parts: tuple[Tensor, ...]
    """(rows, ...) each, one after another."""
    order: Tensor | None = None
    """(rows of all,) int64: which of the rows each row of the whole is; None is as they follow."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts must be at least one tensor, got none")
        first = self.parts[0]
        for part in self.parts:
            expected = (first.shape[1:], first.dtype, first.device)
            if (part.shape[1:], part.dtype, part.device) != expected:
                raise ValueError(
                    f"parts must be as the first, (rows, *{tuple(first.shape[1:])}) {first.dtype} "
                    f"on {first.device}, got {tuple(part.shape)} {part.dtype} on {part.device}"
                )
        if self.order is not None and self.order.shape != (len(self),):
            raise ValueError(f"order must be ({len(self)},), got {tuple(self.order.shape)}")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size([len(self), *self.parts[0].shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Of each part."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Of each part."""
        return self.parts[0].device


def flatten(weights: Sequence[Tensor | Stacked | None]) -> tuple[list[Tensor | None], Layout]:
    """The tensors of some weights, as autograd is given them; those of one lie together."""
    each = [[*w.parts, w.order] if isinstance(w, Stacked) else [w] for w in weights]
    return [t for tensors in each for t in tensors], tuple(map(len, each))


def whole(flat: Sequence[Tensor | None], layout: Layout, dtype: torch.dtype) -> list[Tensor | None]:
    """The weights in a dtype: as `cast` gives them, and copies of those of several tensors."""
    fields = list(_by_weight(flat, layout))
    found = cast([field[0] if len(field) == 1 else None for field in fields], dtype)
    return [
        each if len(field) == 1 else _stack(field, dtype)
        for each, field in zip(found, fields, strict=True)
    ]


def wanted(needed: Sequence[bool], layout: Layout) -> list[bool]:
    """Of which weights a tensor's gradient is needed, from whether it is for each."""
    return [any(field) for field in _by_weight(needed, layout)]


def apart(
    grads: Sequence[Tensor | None], flat: Sequence[Tensor | None], layout: Layout
) -> list[Tensor | None]:
    """Gradients of the tensors from those of the weights; those of one share memory."""
    found = []
    for grad, field in zip(grads, _by_weight(flat, layout), strict=True):
        if len(field) == 1 or grad is None:
            found += [grad] * len(field)
            continue
        *parts, order = field
        if order is not None:
            grad = grad.index_select(0, order.argsort())
        found += [*grad.split([len(part) for part in parts]), None]
    return found


def _by_weight(flat: Sequence, layout: Layout) -> Iterator[Sequence]:
    start = 0
    for count in layout:
        yield flat[start : start + count]
        start += count


def _stack(field: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    *parts, order = field
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    y = torch.empty(shape, dtype=dtype, device=parts[0].device)
    for rows, part in zip(y.split([len(part) for part in parts]), parts, strict=True):
        rows.copy_(wide(part))
    return y if order is None else y.index_select(0, order)
