"""Which ways of training fit a device, the fastest first; all by prediction.

The time of a sweep, in which every layer is updated once, is taken to be

    flops / (SHARE * peak flops) + ops * OP_SECONDS + swapped bytes / (SHARE * link)

Peaks are the vendors' of dense matmuls without TF32, and of one direction of the link to the host.
A run with one block on the device takes so many steps per swap that swaps are SWAP_SHARE of its
time, so they are not counted as more. Only ratios of such times are meant to be read.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dbkernels.memory.trace import CATEGORIES
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.training.block_order import fewest_steps_per_swap
from dbkernels.training.estimate import STATE, Estimate, Setting
from dbkernels.training.trainer_config import Offload

Predictor = Callable[[Setting], dict[Offload, Estimate]]

SHARE = 0.5  # of a peak that a step reaches
OP_SECONDS = 5e-6  # to launch an op, and for a GPU to fill and drain
CONTEXT = 2**29  # bytes that CUDA's context takes beside a run's tensors; differs by driver
FREE = "free_in_allocator"  # beside CATEGORIES
GROWING = ("inputs", "saved_activations", "temporaries", "workspaces")  # with the micro-batch


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

    def seconds(self, estimate: Estimate, num_blocks: int, *, autocast: bool) -> float:
        """Of a sweep, by the formula above."""
        peak = self.bfloat16 if autocast else self.float32
        working = estimate.flops / (SHARE * peak) + estimate.ops * OP_SECONDS
        swapping = estimate.swapped / (SHARE * self.link)
        return working + swapping / fewest_steps_per_swap(
            working / num_blocks, swapping / num_blocks
        )


SPEEDS = {
    "cpu": Speed(1e12, 1e12, 5e10),
    "a100": Speed(19.5e12, 312e12, 32e9),
    "h100": Speed(67e12, 989e12, 64e9),
    "h200": Speed(67e12, 989e12, 64e9),
    "b200": Speed(75e12, 2250e12, 64e9),
}


@dataclass(frozen=True)
class Plan:
    """A way of training, and what is predicted of it."""

    setting: Setting
    offload: Offload
    estimate: Estimate
    seconds: float  # of a sweep


@dataclass(frozen=True)
class Found:
    """The plans of one number of blocks.

    Args:
        whole:     the setting that computes nothing again and cuts no batch, all blocks on the
                   device; it need not fit
        fitting:   the fastest that fits for each choice of what is on the device
        smallest:  of all that were predicted, whether it fits or not
    """

    whole: Plan
    fitting: list[Plan]
    smallest: Plan


def plans_of(
    num_blocks: int,
    predict: Predictor,
    *,
    batch: int,
    limit: int,
    seconds: Callable[[Estimate, int], float],
    policies: Sequence[Recompute],
) -> Found:
    """The fastest plans of one number of blocks.

    A micro-batch needs less than a larger one, and a policy less than the one before: each policy's
    largest micro-batch that fits is found by few predictions, and policies that are too slow even
    with a whole batch are left out.

    Args:
        num_blocks:  of every plan
        predict:     what a setting needs; asked once for each
        batch:       samples of a step
        limit:       bytes that a plan may take
        seconds:     (estimate, num_blocks) -> of a sweep
        policies:    to choose from, as `policies_of` gives them
    """
    known: dict[Setting, dict[Offload, Plan]] = {}

    def planned(recompute: Recompute, micro_batch: int, offload: Offload) -> Plan:
        setting = Setting(num_blocks, recompute, micro_batch)
        if setting not in known:
            known[setting] = {
                name: Plan(setting, name, estimate, seconds(estimate, num_blocks))
                for name, estimate in predict(setting).items()
            }
        return known[setting][offload]

    whole = planned("none", batch, "none")
    # with one block all is on the device in any case
    offloads = ("none",) if num_blocks == 1 else ("none", "cpu")
    best = [
        _fastest(partial(planned, offload=offload), batch, limit, policies) for offload in offloads
    ]
    every = [plan for plans in known.values() for plan in plans.values()]
    smallest = min(every, key=lambda plan: plan.estimate.peak_bytes)
    return Found(whole, [plan for plan in best if plan], smallest)


def _fastest(
    planned: Callable[[Recompute, int], Plan], batch: int, limit: int, policies: Sequence[Recompute]
) -> Plan | None:
    """The fastest plan that fits of all policies and micro-batches; None where there is none."""
    whole = planned("none", batch)
    if whole.estimate.peak_bytes <= limit:
        return whole
    if planned(policies[-1], 1).estimate.peak_bytes > limit:
        return None
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    best: Plan | None = None
    slow: list[Recompute] = []  # policies that take longer than the best with a whole batch too
    for recompute in policies:
        if any(_redoes(recompute, other) for other in slow):
            continue
        if best and planned(recompute, batch).seconds >= best.seconds:
            slow.append(recompute)
            continue
        plan = _largest(_worth_trying(sizes, recompute, best), partial(planned, recompute), limit)
        if plan and (best is None or plan.seconds < best.seconds):
            best = plan
    return best


def _redoes(recompute: Recompute, other: Recompute) -> bool:
    """Whether a policy computes all again that another does."""
    return POLICIES[recompute].keeps <= POLICIES[other].keeps


def _worth_trying(sizes: Sequence[int], recompute: Recompute, best: Plan | None) -> Sequence[int]:
    """Micro-batches with which a policy may be faster than the best of those before it."""
    if best is None:
        return sizes
    more = _redoes(recompute, best.setting.recompute)
    return sizes[bisect_left(sizes, best.setting.micro_batch) + more :]


def _largest(sizes: Sequence[int], planned: Callable[[int], Plan], limit: int) -> Plan | None:
    """The plan of the largest micro-batch that fits; None where the smallest does not."""
    best, low, high = None, -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    place = high - 1
    while high - low > 1:
        plan = planned(sizes[place])
        if plan.estimate.peak_bytes <= limit:
            best, low = plan, place
        else:
            high = place
        place = min(max(_guess(plan, sizes, limit), low + 1), high - 1)
    return best


def _guess(plan: Plan, sizes: Sequence[int], limit: int) -> int:
    """Index of the largest size that fits if what grows with it were all in proportion."""
    growing = sum(plan.estimate.by_category[name] for name in GROWING)
    room = limit - (plan.estimate.peak_bytes - growing)
    return bisect_right(sizes, plan.setting.micro_batch * room / max(1, growing)) - 1


def smallest_setting(depth: int, policies: Sequence[Recompute]) -> Setting:
    """Of a model with `depth` layers, what needs the least."""
    return Setting(depth, policies[-1], 1)


def outside_layers(several: dict[Offload, Estimate], num_blocks: int) -> dict[str, int]:
    """Bytes of the stem and the head, which no number of blocks divides: each of STATE.

    Args:
        several:     of a setting with more than one block
        num_blocks:  of that setting
    """
    every, one = several["none"].by_category, several["cpu"].by_category
    return {name: one[name] - (every[name] - one[name]) // (num_blocks - 1) for name in STATE}


def shares(estimate: Estimate, outside: dict[str, int]) -> dict[str, int]:
    """What fills a device at the peak, in bytes that add up to it.

    Args:
        need:     of a plan
        outside:  of `outside_layers`
    Returns:
        Each of CATEGORIES without the stem's and the head's share of STATE; that share; and what
        the allocator holds free.
    """
    layers = {name: estimate.by_category[name] - outside.get(name, 0) for name in CATEGORIES}
    free = estimate.peak_bytes - sum(estimate.by_category.values())
    return {**layers, "stem_and_head": sum(outside.values()), FREE: free}
