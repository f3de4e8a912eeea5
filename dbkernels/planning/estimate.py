"""What one way of training needs: the bytes of its costliest step, the operations of a sweep.

A sweep is one step of every block: each layer is updated once. Where a batch is cut into
micro-batches, all but the first find gradients there to add to, and need the same; so two of them
tell of all.

The time of a sweep is taken to be

    flops / (SHARE * peak flops) + ops * OP_SECONDS + swapped bytes / (SHARE * link)

Peaks are the vendors' of dense matmuls without TF32, and of one direction of the link to the host.
A run with one block on the device takes so many steps per swap that swaps are SWAP_SHARE of its
time, so they are not counted as more. Only ratios of such times are meant to be read.
"""

from dataclasses import dataclass, replace

from dbkernels.planning.dry_run import dry_run
from dbkernels.planning.recipe import Recipe
from dbkernels.training.schedule import fewest_steps_per_swap
from dbkernels.training.trainer_config import Offload

FOLLOWED = 2  # micro-batches
STATE = "parameters", "optimizer"  # categories of which a block brings its own with it
SHARE = 0.5  # of a peak that a step reaches
OP_SECONDS = 5e-6  # to launch an op, and for a GPU to fill and drain


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs of its device.

    Args:
        peak_bytes:   what the costliest step takes from the driver
        by_category:  bytes of each of CATEGORIES at the step's peak of allocated bytes
        flops:        of matmuls and attention, in a sweep
        ops:          calls of ops, in a sweep
        swapped:      bytes that a sweep moves, with each block brought once and taken back
    """

    peak_bytes: int
    by_category: dict[str, int]
    flops: int
    ops: int
    swapped: int = 0


def estimate(recipe: Recipe) -> dict[Offload, Estimate]:
    """What a recipe needs with all blocks on the device, and with one block on it."""
    followed = min(recipe.accumulate, FOLLOWED)
    fewer = replace(recipe, batch_size=followed * recipe.micro_batch, accumulate=followed)
    times, found = recipe.num_blocks * recipe.accumulate / followed, dry_run(fewer)
    # the others are all blocks but one
    elsewhere = sum(
        found["none"].by_category[name] - found["cpu"].by_category[name] for name in STATE
    )
    own = elsewhere // max(1, recipe.num_blocks - 1)
    return {
        offload: Estimate(
            peak_bytes=prediction.peak_reserved_bytes,
            by_category=prediction.by_category,
            flops=round(times * prediction.flops),
            # the few that a step has once are counted with every micro-batch
            ops=round(times * prediction.ops),
            swapped=2 * own * recipe.num_blocks if offload == "cpu" else 0,
        )
        for offload, prediction in found.items()
    }


@dataclass(frozen=True)
class Speed:
    """Peaks of a device.

    Args:
        float32:   floating-point operations per second
        bfloat16:  likewise
        link:      bytes per second from and to the host
    """

    float32: float
    bfloat16: float
    link: float

    def seconds(self, estimate: Estimate, recipe: Recipe) -> float:
        """Of a sweep, by the formula above."""
        peak = self.bfloat16 if recipe.autocast else self.float32
        working = estimate.flops / (SHARE * peak) + estimate.ops * OP_SECONDS
        swapping = estimate.swapped / (SHARE * self.link)
        steps = fewest_steps_per_swap(working / recipe.num_blocks, swapping / recipe.num_blocks)
        return working + swapping / steps


SPEEDS = {
    "cpu": Speed(1e12, 1e12, 5e10),
    "a100": Speed(19.5e12, 312e12, 32e9),
    "h100": Speed(67e12, 989e12, 64e9),
    "h200": Speed(67e12, 989e12, 64e9),
    "b200": Speed(75e12, 2250e12, 64e9),
}
