"""Steps of small models by two processes of this machine over gloo: their times and peaks.

A way that takes one GPU is run by both processes at once, each for itself, so that each has as much
of the machine as where they share a step.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pipelined
import torch
import torch.distributed as dist
from collectives import HOST, Collectives, counting
from composition_ways import PIPELINES, Composed, Way
from show import Row
from torch.multiprocessing import spawn

from dbkernels.memory.measure import record
from dbkernels.planning.recipe import Recipe
from dbkernels.training.parallel.job import Job, job_on, mesh_of

PROCESSES = 2
DEPTH = 8
SIZES = {
    "dit": {"dim": 128, "num_heads": 4, "image_size": 16, "channels": 4},
    "ar": {"dim": 128, "num_heads": 4, "mlp_hidden": 512, "vocabulary": 1024},
}
SINGLE = ("plain torch", "checkpointing", "recompute layer")  # a CPU is its own host
WAYS = (
    (),
    *((part,) for part in SINGLE),
    ("optimizer in backward",),
    ("FSDP2 2",),
    ("tensor 2",),
    ("pipeline 2",),
    ("FSDP2 2", "recompute layer"),
    ("tensor 2", "recompute layer"),
)
WARM_UP = 1  # step that are not timed


def small(model: Recipe) -> Recipe:
    """A model of the same family that a CPU can train."""
    sizes = SIZES[model.family]
    name = f"of {DEPTH} layers of {sizes['dim']}"
    return replace(model, preset=name, model=replace(model.model, depth=DEPTH, **sizes))


def rows_of(model: Recipe, ways: Sequence[Way], rounds: int) -> list[Row]:
    """Figures of some ways, in their order: of the process that needs the most, and the slower one.

    Args:
        model:   that is trained on a CPU
        ways:    of one process, or of two
        rounds:  steps that are timed
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (folder, model, list(ways), rounds), nprocs=PROCESSES)
        files = (Path(folder, f"{rank}.json") for rank in range(PROCESSES))
        of_ways = list(zip(*(json.loads(file.read_text()) for file in files), strict=True))
    return [
        max(each, key=lambda row: row["peak_allocated_bytes"])
        | {"step_ms": max(row["step_ms"] for row in each)}
        for each in of_ways
    ]


def _work(rank: int, folder: str, model: Recipe, ways: Sequence[Way], rounds: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=PROCESSES)
    found = list(_measured(rank, model, ways, rounds))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)


def _measured(rank: int, model: Recipe, ways: Sequence[Way], rounds: int) -> Iterator[Row]:
    for way in ways:
        torch.manual_seed(0)
        recipe = way.recipe(model)
        step, told = (_of_stage if {*way.parts} & {*PIPELINES} else _of_trainer)(recipe, rank)
        with ExitStack() as stack:
            # a stage is no trainer's
            steps = stack.enter_context(counting())
            steps = [stack.enter_context(Collectives()).bytes] if recipe.stages > 1 else steps
            # the first step: FSDP2 fills and empties the same storages in all that follow, which
            # the tracker would take for storages that are never empty
            trace = record(step, **told)
        times = []
        for number in range(WARM_UP + rounds):
            dist.barrier()
            begin = perf_counter()
            step()
            times += [perf_counter() - begin] * (number >= WARM_UP)
        peak, (sent,) = trace.peak(), steps
        copied = sent.pop(HOST, 0)
        yield {
            "peak_allocated_bytes": peak.total_bytes,
            "by_category": peak.by_category,
            "flops": trace.flops,
            "sent_bytes": sent.total(),
            "sent": dict(sent),
            "host_bytes": copied,
            "step_ms": 1e3 * statistics.median(times),
        }


def _of_trainer(recipe: Composed, rank: int) -> tuple[Callable[[], object], Row]:
    only = 0 if recipe.num_blocks > 1 else None
    job = Job(only)
    if recipe.devices > 1:
        mesh = mesh_of("cpu", 1, recipe.data_parallel, recipe.tensor_parallel)
        job = job_on(mesh, only)
    trainer = recipe.trainer("cpu", job)
    (block,) = trainer.blocks.trained
    (group,) = trainer.moved(block)
    told = {"model": trainer.blocks, "optimizers": group.optimizers}
    # `counting` changes what is called
    return lambda: trainer.advance(block), told


def _of_stage(recipe: Composed, rank: int) -> tuple[Callable[[], object], Row]:
    piece = pipelined.piece_of(recipe, rank, recipe.stages)
    step = pipelined.step_of(piece, rank, recipe.stages)
    told = {"model": piece.stage, "optimizers": piece.group.optimizers, "inputs": piece.inputs}
    piece.update(step())  # the first one finds out what is received
    return lambda: piece.update(step()), told
