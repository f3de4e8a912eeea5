"""A model that is easy to reckon with, in place of dry runs."""

from dataclasses import replace

from dbkernels.memory.tracker import CATEGORIES
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning.search import Estimate, seconds_of

MiB = 2**20


def reckoned(recipe):
    """As `estimate`: a MiB per layer, sample and unit; 30 per layer, 16 for the head."""
    depth, policy = recipe.model.depth, POLICIES[recipe.recompute]
    layers = depth // recipe.num_blocks
    found = {}
    for offload in recipe.offloads:
        held = depth if offload == "none" else layers
        sizes = {
            "parameters": 4 + 10 * held,
            "optimizer": 12 + 20 * held,
            # all but the last policy have twice as many bytes to a unit
            "saved_activations": recipe.micro_batch * layers * policy.units / (1 + policy.narrow),
        }
        flops, swapped = 10**12 * (20 - policy.units), 60 * MiB * depth * (offload == "cpu")
        found[offload] = Estimate(
            recipe=replace(recipe, offload=offload),
            peak_bytes=int(MiB * sum(sizes.values())) + MiB,
            by_category={name: int(MiB * sizes.get(name, 0)) for name in CATEGORIES},
            flops=flops,
            seconds=seconds_of(recipe, flops, 1000 * recipe.accumulate, swapped),
        )
    return found


def wide(recipe):
    """As `reckoned`, but that a model needs a MiB for each element of its width."""
    grown = recipe.model.dim * MiB
    return {k: replace(v, peak_bytes=grown) for k, v in reckoned(recipe).items()}
