"""Where a process stands among those that torchrun has started.

    rank = (block * data + data's own) * tensor + tensor's own

The processes make a mesh (block, data, tensor). Those of one block share its batch along data, and
its layers along tensor; between blocks nothing is ever sent. A job that trains one block, or all
blocks in each process, has a mesh with one block.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dbkernels.settings import check_number
from dbkernels.training.checkpoint.writers import writers_of

MINUTES = 30  # that a process waits for another, which may write a checkpoint


class Axis(NamedTuple):
    """One dimension of the mesh, as a process sees it."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Of this dimension; None where a process is alone in it."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of its processes."""
        return None if self.mesh is None else self.mesh.get_group()


ONE = Axis()


class Job:
    """This process among those that train the same block.

    Args:
        block:   index of the block that they train; None is all
        data:    those that share a batch
        tensor:  those that share each layer
        group:   of all of them; None where this process is alone
    """

    def __init__(
        self,
        block: int | None = None,
        data: Axis = ONE,
        tensor: Axis = ONE,
        group: dist.ProcessGroup | None = None,
    ):
        self.block, self.data, self.tensor, self.group = block, data, tensor, group
        self.asked = False
        """Whether this process was asked to end, which `mean` tells the others."""

    @property
    def count(self) -> int:
        """Of the processes that train the block."""
        return self.data.size * self.tensor.size

    @property
    def is_first(self) -> bool:
        """Whether it writes what one of them writes for all."""
        return not self.data.rank and not self.tensor.rank

    def shares_out(self, shard: bool) -> bool:
        """Whether each process holds a share of every parameter, where that is asked for."""
        return shard and self.data.mesh is not None

    def share(self, batch_size: int, accumulate: int = 1) -> slice:
        """Samples of a step that this process takes.

        Args:
            batch_size:  of all
            accumulate:  micro-batches that each process cuts its share into
        Raises:
            ValueError: the batch cannot be shared evenly, or its shares be cut so.
        """
        if batch_size % (self.data.size * accumulate):
            cut = f" times {accumulate} micro-batches" if accumulate > 1 else ""
            raise ValueError(
                f"batch_size must be a multiple of the {self.data.size} processes that share a "
                f"batch{cut}, got {batch_size}"
            )
        size = batch_size // self.data.size
        return slice(self.data.rank * size, (self.data.rank + 1) * size)

    def mean(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a number () over all processes, and how many of them were asked to end."""
        told = torch.stack([loss, torch.full_like(loss, self.asked, dtype=loss.dtype)])
        if self.group is not None:
            dist.all_reduce(told, group=self.group)
        return told[0] / self.count, told[1]

    def on_first(self, action: Callable[[], object]) -> None:
        """Do something on the first process, while the others wait; an error of it is everyone's.

        Raises:
            FloatingPointError, ValueError, OSError, RuntimeError: what it raised.
        """
        writers_of(self.group).do(action if self.is_first else lambda: None)

    def agree(self, what: str, value: object) -> None:
        """Refuse to start where processes of the job were told different things.

        Args:
            what:   it is, for the message
            value:  that JSON has
        Raises:
            ValueError: on every process, with the ranks that differ from the first.
        """
        if self.group is None:
            return
        found: list[str] = [""] * dist.get_world_size(self.group)
        dist.all_gather_object(found, json.dumps(value, sort_keys=True), group=self.group)
        others = [rank for rank, text in enumerate(found) if text != found[0]]
        if others:
            named = ", ".join(map(str, others))
            raise ValueError(
                f"{what} must be the same on all {len(found)} processes, got another on rank "
                f"{named} than on rank 0"
            )


ALONE = Job()


def launched() -> bool:
    """Whether torchrun, or something like it, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def open_job(
    device: torch.device | str,
    *,
    blocks: int | None = None,
    block: int | None = None,
    tensor: int = 1,
) -> Iterator[Job]:
    """Meet the other processes of the job; a process that torchrun has not started is alone.

    Args:
        device:  that each process trains on; a GPU is this one's own
        blocks:  that the job trains side by side; None has each process train all of them
        block:   the one block that the job trains; None with `blocks`, or for all
        tensor:  processes that share each layer
    Raises:
        ValueError: the processes cannot be shared out so.
    """
    check_number("tensor_parallel", tensor, 1)
    if not launched():
        if tensor > 1:
            raise ValueError(
                f"tensor_parallel must be 1 for one process, got {tensor}: torchrun starts several"
            )
        yield Job(block)
        return
    world = int(os.environ["WORLD_SIZE"])
    if world == 1:
        blocks = None
    groups = 1 if block is not None or blocks is None else blocks
    if world % (groups * tensor):
        raise ValueError(
            f"the number of processes must be a multiple of {groups * tensor} (blocks side by "
            f"side {groups}, tensor_parallel {tensor}), got {world}"
        )
    device = torch.device(device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    # the host's own group is for what is told, not computed
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=MINUTES)
    )
    try:
        mesh = mesh_of(device.type, groups, world // (groups * tensor), tensor)
        if block is None and blocks is not None:
            block = mesh.get_local_rank("block")
        yield job_on(mesh, block)
    finally:
        dist.destroy_process_group()


def mesh_of(device: str, blocks: int, data: int, tensor: int) -> DeviceMesh:
    """The mesh of all processes, so many along each dimension; each of them makes it."""
    names = ("block", "data", "tensor")
    return init_device_mesh(device, (blocks, data, tensor), mesh_dim_names=names)


def job_on(mesh: DeviceMesh, block: int | None) -> Job:
    """This process in a mesh; every process of the mesh makes its own."""
    return Job(block, _axis(mesh, "data"), _axis(mesh, "tensor"), _group(mesh))


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    own = mesh[name]
    return Axis(own.get_local_rank(), own.size(), own if own.size() > 1 else None)


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Of all processes of this one's block; every process of the job makes those of all blocks."""
    if mesh["data"].size() * mesh["tensor"].size() == 1:
        return None
    made = [dist.new_group(ranks.flatten().tolist()) for ranks in mesh.mesh]
    return made[mesh.get_local_rank("block")]
