"""A model that is easy to reckon with, in place of dry runs."""

from dbkernels.memory.trace import CATEGORIES
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.training.estimate import Estimate

MiB = 2**20


def reckoned(setting, config, target):
    """As `estimate`: a MiB per layer, sample and unit; 30 per layer, 16 for the head."""
    depth, batch = config.model.depth, config.trainer.batch_size
    layers = depth // setting.num_blocks
    grown = MiB * setting.micro_batch * layers * POLICIES[setting.recompute].units
    found = {}
    for offload, held in (("none", depth), ("cpu", layers)):
        sizes = {"parameters": 4 + 10 * held, "optimizer": 12 + 20 * held}
        by_category = dict.fromkeys(CATEGORIES, 0) | {k: v * MiB for k, v in sizes.items()}
        by_category["saved_activations"] = grown
        found[offload] = Estimate(
            peak_bytes=sum(by_category.values()) + MiB,
            by_category=by_category,
            flops=10**12 * (20 - POLICIES[setting.recompute].units),
            ops=1000 * batch // setting.micro_batch,
            swapped=0 if offload == "none" else 60 * MiB * depth,
        )
    return found


def in_turn(jobs):
    """As the search runs jobs, in this process."""
    return enumerate(job() for job in jobs)
