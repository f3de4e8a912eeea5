"""One process that stands for a rank of many, in a dry run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dbkernels.training.parallel.job import ALONE, Job, job_on, mesh_of


@contextmanager
def fake_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of a process group whose collectives send nothing.

    Meshes are made of it before FakeTensorMode is on, since a mesh reads the ranks' numbers.

    Args:
        world:  number of ranks, at least 1
        rank:   of this process, from 0
    Raises:
        ValueError: there is no such rank, or this process is a rank of a process group already.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
    if dist.is_initialized():
        raise ValueError(
            "ranks can be predicted where no process group is open, "
            f"got one of {dist.get_world_size()} ranks over {dist.get_backend()}"
        )
    try:
        dist.init_process_group("fake", rank=rank, world_size=world)
        yield
    finally:
        # a failed start has opened none
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def fake_job(data: int, tensor: int) -> Iterator[Job]:
    """Be the first of the processes that train a model or one of its blocks.

    The first has as much of each parameter as any other, and as much to compute.

    Args:
        data:    processes that share a batch
        tensor:  processes that share each layer
    """
    if data * tensor == 1:
        yield ALONE
        return
    with fake_ranks(data * tensor):
        yield job_on(mesh_of("cpu", 1, data, tensor), None)
