"""A model that is easy to reckon with, in place of dry runs."""

from dbkernels.memory.tracker import CATEGORIES
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.planning.estimate import Estimate

MiB = 2**20


def reckoned(recipe):
    """As `estimate`: a MiB per layer, sample and unit; 30 per layer, 16 for the head."""
    depth, policy = recipe.model.depth, POLICIES[recipe.recompute]
    layers = depth // recipe.num_blocks
    found = {}
    for offload, held in (("none", depth), ("cpu", layers)):
        sizes = {
            "parameters": 4 + 10 * held,
            "optimizer": 12 + 20 * held,
            "saved_activations": recipe.micro_batch * layers * policy.units,
        }
        found[offload] = Estimate(
            peak_bytes=MiB * sum(sizes.values()) + MiB,
            by_category={name: MiB * sizes.get(name, 0) for name in CATEGORIES},
            flops=10**12 * (20 - policy.units),
            ops=1000 * recipe.accumulate,
            swapped=0 if offload == "none" else 60 * MiB * depth,
        )
    return found


def wide(recipe):
    """As `reckoned`, but that a model needs a MiB for each element of its width."""
    grown = recipe.model.dim * MiB
    found = reckoned(recipe)
    return {k: Estimate(**{**vars(v), "peak_bytes": grown}) for k, v in found.items()}


def in_turn(jobs, told):
    """As `results` gives them, in this process."""
    return [job() for job in jobs]
