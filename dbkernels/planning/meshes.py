"""How many devices train a model together: meshes (block, data, tensor) that fit, fastest first.

Blocks that stand side by side send each other nothing, so each number of blocks has the first of
these meshes of which a plan fits: the most blocks side by side, then the fewest devices to a layer.
All other devices share a batch and, where there are several, the parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch

from dbkernels.planning.recipe import Recipe
from dbkernels.planning.search import (
    Answer,
    Estimate,
    Estimates,
    Found,
    context_bytes,
    counts_of,
    estimate,
    outside_layers,
    plans_of,
)
from dbkernels.pool import results
from dbkernels.training.optimizers.registry import OPTIMIZERS

TENSOR = 1, 2, 4, 8  # devices to a layer, which are of one machine


def search_meshes(
    recipe: Recipe,
    devices: int,
    memory: int,
    told: Callable[[int, int, Found | None], None] = lambda done, total, found: None,
) -> Answer:
    """Every number of blocks, mesh, recompute policy and micro-batch that may be the fastest.

    Args:
        recipe:   what is searched for takes the place of its own
        devices:  that train it
        memory:   bytes of each
        told:     called with how many of how many parts of the search are done, and their plans
    Returns:
        Whose `largest` is None; the whole is end to end on all devices.
    Raises:
        ValueError: no mesh of so many devices can share the batch, or the recipe has adapters.
    """
    if recipe.lora.rank:
        raise ValueError(f"lora must be 0 for several devices, got {recipe.lora.rank}")
    limit = memory - context_bytes(recipe.device)
    counts = counts_of(recipe.model.depth) if recipe.model.independent else [1]
    cuts = _cuts(recipe)
    ways = [list(meshes(replace(recipe, num_blocks=n), devices, cuts)) for n in counts]
    if not ways[0]:
        raise ValueError(
            f"batch must be a multiple of what shares it of {devices} devices, of which at most "
            f"{max(cuts)} share a layer, got {recipe.batch_size}"
        )
    jobs = [partial(_first, each, estimate, limit) for each in ways if each]
    found: list[Found] = []
    for part in results(jobs):
        found.append(part)
        told(len(found), len(jobs), part)
    return Answer(
        whole=found[0].whole,
        plans=sorted((plan for each in found for plan in each.plans), key=attrgetter("seconds")),
        smallest=min((each.smallest for each in found), key=attrgetter("peak_bytes")),
        largest=None,
        outside=outside_layers(found[0].whole),
    )


def meshes(recipe: Recipe, devices: int, cuts: tuple[int, ...]) -> Iterator[tuple[Recipe, int]]:
    """One device's recipe in each mesh, and how many blocks train side by side, in this order.

    Args:
        recipe:   whose number of blocks is given
        devices:  in all
        cuts:     devices that may share a layer
    """
    apart = OPTIMIZERS[recipe.optimizer].by_element
    for blocks in range(recipe.num_blocks, 0, -1):
        if recipe.num_blocks % blocks or devices % blocks:
            continue
        of_block = devices // blocks
        for tensor in cuts:
            data = of_block // tensor
            if of_block % tensor or recipe.batch_size % data:
                continue
            shared = replace(recipe, data_parallel=data, tensor_parallel=tensor)
            yield replace(shared, shard=apart and data > 1, alone=recipe.num_blocks > 1), blocks


def _cuts(recipe: Recipe) -> tuple[int, ...]:
    """Numbers of TENSOR among which every layer can be cut."""
    if not OPTIMIZERS[recipe.optimizer].by_element:
        return TENSOR[:1]
    with torch.device("meta"):
        layers = recipe.config().build("meta").model.layers
    sizes = [
        getattr(getattr(layer, "config", None), name, 1)
        for layer in layers
        for name in ("num_heads", "mlp_hidden")
    ]
    return tuple(n for n in TENSOR if all(size % n == 0 for size in sizes))


def _first(
    ways: list[tuple[Recipe, int]], predict: Callable[[Recipe], Estimates], limit: int
) -> Found:
    """The plans of the first mesh that has any; the whole is of the first."""
    tried: list[Found] = []
    for recipe, blocks in ways:
        found = plans_of(recipe, predict, limit)
        plans = [_side_by_side(plan, blocks) for plan in found.plans]
        tried.append(replace(found, plans=plans))
        if plans:
            break
    smallest = min((each.smallest for each in tried), key=attrgetter("peak_bytes"))
    return Found(tried[0].whole, tried[-1].plans, smallest)


def _side_by_side(plan: Estimate, blocks: int) -> Estimate:
    return replace(plan, side_by_side=blocks, seconds=plan.seconds / blocks)
