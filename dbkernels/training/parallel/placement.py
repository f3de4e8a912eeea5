"""What of each parameter this process holds, and where in the whole it lies.

A layer's weights may be cut among the processes that share the layer; of what is left, FSDP2 gives
each of those that share a batch some rows: ceil(rows / processes), and the last ones fewer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dbkernels.models.tensor_parallel import Cut
from dbkernels.training.checkpoint.shard import Box, Shard
from dbkernels.training.parallel.job import ALONE, Axis, Job


def here(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds: of one that is not shared out, itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local().detach()


class Placement(NamedTuple):
    """Where what this process holds of one parameter lies in the whole."""

    shape: tuple[int, ...]
    """Of the whole."""
    boxes: tuple[Box, ...]
    copies: int
    """Processes that hold the same."""
    is_first: bool
    """Whether this is the first of them, which saves it."""


class Placements:
    """Of all parameters that a process trains with others.

    Args:
        job:   this process among them
        cuts:  how parameters are cut among those that share a layer
    """

    def __init__(self, job: Job = ALONE, cuts: Mapping[nn.Parameter, Cut] | None = None):
        self.job, self._cuts = job, dict(cuts or {})

    def is_shared_out(self, parameter: nn.Parameter) -> bool:
        """Whether each process that shares a batch holds some of its rows."""
        return hasattr(parameter, "to_local")

    def of(self, parameter: nn.Parameter) -> Placement:
        """Of one parameter."""
        data, tensor, cut = self.job.data, self.job.tensor, self._cuts.get(parameter)
        shape = tuple(parameter.shape)
        boxes: tuple[Box, ...] = (Box((0,) * len(shape), shape, 0),)
        if cut is not None:
            shape, boxes = _cut(shape, cut, tensor)
        is_shared_out = self.is_shared_out(parameter)
        if is_shared_out:
            boxes = _rows(boxes, len(parameter), data)
        sharing = [axis for axis, apart in ((data, is_shared_out), (tensor, cut)) if not apart]
        copies = 1
        for axis in sharing:
            copies *= axis.size
        return Placement(shape, boxes, copies, not any(axis.rank for axis in sharing))

    def held(self, parameter: nn.Parameter | None, local: Tensor) -> Tensor | Shard:
        """For a checkpoint, a tensor that lies as a parameter does; None is one that is whole."""
        if parameter is None or not self._is_apart(parameter):
            return local
        shape, boxes, _, is_first = self.of(parameter)
        return Shard(local, shape, boxes if is_first else ())

    def part(self, parameter: nn.Parameter | None, whole: Tensor) -> Tensor:
        """What this process holds of a whole tensor that lies as a parameter does."""
        if parameter is None or not self._is_apart(parameter):
            return whole
        return torch.cat([whole[_slices(box)] for box in self.of(parameter).boxes])

    def _is_apart(self, parameter: nn.Parameter) -> bool:
        return parameter in self._cuts or self.is_shared_out(parameter)


def _cut(own: tuple[int, ...], cut: Cut, tensor: Axis) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """Shape of the whole of a cut parameter, and the boxes of this process's part."""
    shape = list(own)
    shape[cut.dim] *= tensor.size
    size = list(own)
    size[cut.dim] //= cut.parts
    boxes = []
    for part in range(cut.parts):
        at = [0] * len(own)
        at[cut.dim] = (part * tensor.size + tensor.rank) * size[cut.dim]
        boxes.append(Box(tuple(at), tuple(size), part * size[0]))
    return tuple(shape), tuple(boxes)


def _rows(boxes: tuple[Box, ...], rows: int, data: Axis) -> tuple[Box, ...]:
    """What of some boxes lies in this process's rows."""
    most = -(-rows // data.size)
    first, last = min(data.rank * most, rows), min((data.rank + 1) * most, rows)
    found = []
    for at, size, row in boxes:
        start, stop = max(row, first), min(row + size[0], last)
        if start < stop:
            moved = (at[0] + start - row, *at[1:])
            found.append(Box(moved, (stop - start, *size[1:]), start - first))
    if not found:
        at, size, _ = boxes[0]
        return (Box(at, (0, *size[1:]), 0),)
    return tuple(found)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(box.at, box.size, strict=True))


HERE_ALONE = Placements()
