"""Two stages of a pipeline, each a process: what a step of each gives and needs.

It is imported where the benchmarks are on the path, which processes that are started have too.
"""

import os
from dataclasses import replace

import pipelined
import torch
import torch.distributed as dist
from collectives import Collectives
from composition_ways import Way
from torch.multiprocessing import spawn

from dbkernels.memory.allocator import target_named
from dbkernels.memory.measure import record
from dbkernels.models.registry import FAMILIES
from dbkernels.planning.recipe import of_preset

STAGES = 2


def recipe_of(family, num_blocks):
    """A model of a few layers, more of them than stages share evenly."""
    model = of_preset(family, FAMILIES[family].model.smallest)
    sizes = {"depth": 5 * num_blocks}
    model = replace(model, model=replace(model.model, **sizes), device=target_named("cpu"))
    return Way(num_blocks, ("pipeline 4",)).recipe(replace(model, batch_size=16))


def piece_of(recipe, rank, size):
    """A stage whose weights are those of the whole model of one process."""
    torch.manual_seed(0)
    piece = pipelined.piece_of(recipe, rank, size)
    with torch.no_grad():
        for name, p in sorted(piece.stage.named_parameters()):
            if not p.any():  # gates and heads that begin with zeros have no gradients behind them
                generator = torch.Generator().manual_seed(len(name) + p.numel())
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return piece


def named_as_in_the_whole(piece, recipe, rank, size, get):
    """Something of each parameter, by the name that it has in a model of one stage."""
    layers = recipe.model.depth // recipe.num_blocks
    before = layers // size + (layers % size > 0) if rank else 0
    found = {}
    for name, p in piece.stage.named_parameters():
        start, _, rest = name.partition("layers.")
        if rest:
            number, _, rest = rest.partition(".")
            name = f"{start}layers.{int(number) + before}.{rest}"
        if get(p) is not None:
            found[name] = get(p).detach().clone()
    return found


def work(rank, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=STAGES
    )
    found = {}
    for case in cases:
        recipe = recipe_of(*case)
        piece = piece_of(recipe, rank, STAGES)
        step = pipelined.step_of(piece, rank, STAGES)
        loss = step()
        grads = named_as_in_the_whole(piece, recipe, rank, STAGES, lambda p: p.grad)
        piece.update(loss)
        told = {"model": piece.stage, "optimizers": piece.group.optimizers, "inputs": piece.inputs}
        with Collectives() as handed:
            trace = record(lambda step=step, piece=piece: piece.update(step()), **told)
        peak = trace.peak()
        found[case] = {
            "loss": loss.item(),
            "grads": grads,
            "peak": peak.total_bytes,
            "by_category": peak.by_category,
            "saved": trace.saved,
            "sent": dict(handed.bytes),
        }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)


def run(folder, cases):
    """What each stage found, by its rank and the case."""
    spawn(work, (str(folder), cases), nprocs=STAGES)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(STAGES)]
