"""What one way of training needs: the bytes of its costliest step, the operations of a sweep.

A sweep is one step of every block: each layer is updated once. Where a batch is cut into
micro-batches, all but the first find gradients there to add to, and need the same; so two of them
tell of all.
"""

from dataclasses import dataclass, replace

from dbkernels.memory.predict import Prediction
from dbkernels.memory.workspace import Target
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.training.dry_run import dry_run
from dbkernels.training.run import RunConfig
from dbkernels.training.trainer_config import Offload

FOLLOWED = 2  # micro-batches
STATE = "parameters", "optimizer"  # categories of which a block brings its own with it


@dataclass(frozen=True)
class Setting:
    """What is chosen so that a run fits; what is on the device is said beside it.

    Args:
        num_blocks:   1 trains end to end
        recompute:    key of `dbkernels.ops.POLICIES`
        micro_batch:  samples of one backward; divides the batch
    """

    num_blocks: int
    recompute: Recompute
    micro_batch: int


@dataclass(frozen=True)
class Estimate:
    """What a setting needs of a device.

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


def estimate(setting: Setting, config: RunConfig, target: Target) -> dict[Offload, Estimate]:
    """What a setting of a run needs, for all blocks on the device and for one block on it.

    Args:
        setting:  its micro-batch divides the run's batch
        config:   of the run; the setting takes the place of its own
        target:   the device
    """
    pieces = config.trainer.batch_size // setting.micro_batch
    followed = min(pieces, FOLLOWED)
    run = replace(
        config,
        model=replace(config.model, recompute=setting.recompute),
        partition=replace(config.partition, num_blocks=setting.num_blocks),
        trainer=replace(
            config.trainer, batch_size=followed * setting.micro_batch, accumulate=followed
        ),
    )
    found = dry_run(run, target=target)
    both = {name: _estimate(p, setting.num_blocks, pieces / followed) for name, p in found.items()}
    elsewhere = sum(
        both["none"].by_category[name] - both["cpu"].by_category[name] for name in STATE
    )
    # the others are all blocks but one
    own = elsewhere // max(1, setting.num_blocks - 1)
    both["cpu"] = replace(both["cpu"], swapped=2 * own * setting.num_blocks)
    return both


def _estimate(prediction: Prediction, num_blocks: int, times: float) -> Estimate:
    return Estimate(
        peak_bytes=prediction.peak_reserved_bytes,
        by_category=prediction.by_category,
        flops=round(num_blocks * times * prediction.flops),
        # the few that a step has once are counted with every micro-batch
        ops=round(num_blocks * times * len(prediction.trace.ops)),
    )
