"""What one way of training needs: the bytes of its costliest step, the operations of a sweep.

A sweep is one step of every block: each layer is updated once. Where a batch is cut into
micro-batches, all but the first find gradients there to add to, and need the same; so two of them
tell of all.

The time of a sweep is taken to be

    flops / (SHARE * peak flops) + ops * OP_SECONDS + swapped bytes / (SHARE * link)

with the speeds of the target. A run with one block on the device takes so many steps per swap that
swaps are SWAP_SHARE of its time, so they are not counted as more. Only ratios of such times are
meant to be read.
"""

from dataclasses import dataclass, replace

from dbkernels.memory.measure import Prediction
from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import OFFLOAD, Recipe
from dbkernels.training.block_order import fewest_steps_per_swap
from dbkernels.training.trainer_config import Offload

FOLLOWED = 2  # micro-batches
STATE = "parameters", "optimizer"  # categories of which a block brings its own with it
SHARE = 0.5  # of a peak that a step reaches
OP_SECONDS = 5e-6  # to launch an op, and for a GPU to fill and drain


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs of its device.

    Args:
        recipe:       whose offload is that of the estimate
        peak_bytes:   what the costliest step takes from the driver
        by_category:  bytes of each of CATEGORIES at the step's peak of allocated bytes
        flops:        of matmuls and attention, in a sweep
        seconds:      of a sweep
    """

    recipe: Recipe
    peak_bytes: int
    by_category: dict[str, int]
    flops: int
    seconds: float


def estimate(recipe: Recipe) -> dict[Offload, Estimate]:
    """What a recipe needs with all blocks on the device, and with one block on it."""
    followed = min(recipe.accumulate, FOLLOWED)
    fewer = replace(recipe, batch_size=followed * recipe.micro_batch, accumulate=followed)
    times, found = recipe.num_blocks * recipe.accumulate / followed, dry_run(fewer)
    estimates = {}
    for offload, prediction in found.items():
        swapped = 0 if offload == "none" else swapped_bytes(found, recipe.num_blocks)
        # the few ops that a step has once are counted with every micro-batch
        flops, ops = round(times * prediction.flops), round(times * prediction.ops)
        estimates[offload] = Estimate(
            recipe=replace(recipe, offload=offload),
            peak_bytes=prediction.peak_reserved_bytes,
            by_category=prediction.by_category,
            flops=flops,
            seconds=seconds_of(recipe, flops, ops, swapped),
        )
    return estimates


def swapped_bytes(found: dict[Offload, Prediction], num_blocks: int) -> int:
    """Bytes that a sweep moves, with each block brought once and taken back."""
    every, one = (found[offload].by_category for offload in OFFLOAD)
    # the others are all blocks but one
    own = sum(every[name] - one[name] for name in STATE) // max(1, num_blocks - 1)
    return 2 * own * num_blocks


def seconds_of(recipe: Recipe, flops: int, ops: int, swapped: int) -> float:
    """Of a sweep, by the formula above."""
    float32, bfloat16, link = recipe.device.speeds
    working = flops / (SHARE * (bfloat16 if recipe.autocast else float32)) + ops * OP_SECONDS
    swapping = swapped / (SHARE * link)
    steps = fewest_steps_per_swap(working / recipe.num_blocks, swapping / recipe.num_blocks)
    return working + swapping / steps
