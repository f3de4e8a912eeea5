"""Trainers of two ranks: what they hold, and what the allocator says of their steps."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from memory.two_ranks import allocator_peak, meet, part

from dbkernels.memory.allocator import TARGETS
from dbkernels.memory.plain import plain_tensors
from dbkernels.models import ARConfig, DiTConfig
from dbkernels.planning.recipe import Recipe
from dbkernels.training.parallel.job import job_on, mesh_of

DIT = DiTConfig(dim=64, depth=4, num_heads=4, image_size=8, channels=4, num_classes=10)
THROUGH = ARConfig(
    dim=64, depth=4, num_heads=4, mlp_hidden=176, cond_dim=16, length=40, vocabulary=50,
    clean="through",
)  # fmt: skip
ONE = Recipe("dit", "", DIT, batch_size=8, device=TARGETS["cpu"])
DATA = replace(ONE, data_parallel=2)
SHARD = replace(DATA, shard=True)
RECIPES = {
    "data": DATA,
    "shard": SHARD,
    "tensor": replace(ONE, tensor_parallel=2),
    "shard, layer": replace(SHARD, recompute="layer", autocast=True, accumulate=2),
    "shard, blocks": replace(SHARD, num_blocks=2, recompute="qkv"),
    "tensor, blocks": replace(ONE, tensor_parallel=2, num_blocks=2, ema=0.9),
    "shard, average": replace(SHARD, ema=0.9),
    "shard, stock": replace(SHARD, method="end_to_end", recompute=None),
}


def held(trainer, block):
    """Bytes of parameters, of optimizers' state, and of averages that a rank has."""
    own = [p for p in trainer.blocks.of(block).parameters() if p.device.type != "meta"]
    groups = trainer.groups.values()
    states = [state for group in groups for o in group.optimizers for state in o.state.values()]
    state = [tensor for each in states for tensor in each.values()]
    averages = [tensor for group in groups for tensor in group.average.values()]
    return [
        sum(t.untyped_storage().nbytes() for whole in each for _, t in plain_tensors("", whole))
        for each in (own, state, averages)
    ]


def work(rank, rendezvous, results):
    library, found = meet(rank, rendezvous), {}
    for name, recipe in RECIPES.items():
        mesh = mesh_of("cpu", 1, recipe.data_parallel, recipe.tensor_parallel)
        trainer = recipe.trainer("cpu", job_on(mesh, 0 if recipe.num_blocks > 1 else None))
        (block, *_) = trainer.blocks
        step = partial(trainer.advance, block)
        step()
        found[name] = [allocator_peak(step), *held(trainer, block)]
    Path(results, f"{rank}.json").write_text(json.dumps(found))
    library._destroy()
    part()
