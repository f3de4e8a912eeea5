"""Which ways of training fit a device, the fastest first; all by prediction.

An estimate of one way has the bytes of its costliest step and the operations of a sweep.

A sweep is one step of every block: each layer is updated once. Where a batch is cut into
micro-batches, all but the first find gradients there to add to, and need the same; so two of them
tell of all. The optimizer steps once for them all.

The time of a sweep is taken to be

    flops / (SHARE * peak flops) + ops * OP_SECONDS + swapped bytes / (SHARE * link)

with the speeds of the target, of what one device computes; what several devices send each other is
not counted. A run with one block on the device takes so many steps per swap that
swaps are SWAP_SHARE of its time, so they are not counted as more. Only ratios of such times are
meant to be read.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch

from dbkernels.memory.allocator import Target
from dbkernels.memory.measure import Prediction
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.models.registry import family_named
from dbkernels.ops.layer.recompute import POLICIES, Recompute, policies_of
from dbkernels.planning.dry_run import ALONE, dry_run
from dbkernels.planning.recipe import OFFLOAD, Recipe
from dbkernels.pool import results
from dbkernels.training.block_order import fewest_steps_per_swap
from dbkernels.training.optimizers.registry import OPTIMIZERS
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer_config import Offload

COUNTS = 2, 3, 4, 6  # of blocks that are tried where they divide no stack evenly too
PREDICTIONS = 4  # of a number of blocks, about, where not everything fits
CONTEXT = 2**29  # bytes that CUDA's context takes beside a run's tensors; differs by driver
FREE = "free_in_allocator"  # beside CATEGORIES
GROWING = ("inputs", "saved_activations", "temporaries", "workspaces")  # with the micro-batch
FOLLOWED = 2  # micro-batches
STATE = "parameters", "optimizer"  # categories of which a block brings its own with it
SHARE = 0.5  # of a peak that a step reaches
OP_SECONDS = 5e-6  # to launch an op, and for a GPU to fill and drain


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs of its device, or of each of several.

    Args:
        recipe:       whose offload is that of the estimate
        peak_bytes:   what the costliest step takes from the driver
        by_category:  bytes of each of CATEGORIES at the step's peak of allocated bytes
        flops:        of matmuls and attention, in a sweep
        seconds:      of a sweep
        side_by_side:  blocks that train at the same time, each on devices of its own
    """

    recipe: Recipe
    peak_bytes: int
    by_category: dict[str, int]
    flops: int
    seconds: float
    side_by_side: int = 1


Estimates = dict[Offload, Estimate]  # by what is on the device
_smallest = partial(min, key=attrgetter("peak_bytes"))


def estimate(recipe: Recipe) -> Estimates:
    """What a recipe needs with all blocks on the device, and with one block on it."""
    followed = min(recipe.accumulate, FOLLOWED)
    batch = followed * recipe.micro_batch * recipe.data_parallel
    fewer = replace(recipe, batch_size=batch, accumulate=followed)
    found, pieces = dry_run(fewer), recipe.accumulate / followed
    estimates = {}
    for offload, prediction in found.items():
        swapped = 0 if offload == "none" else swapped_bytes(found, recipe)
        trace = prediction.trace
        assert trace is not None
        # the few ops of clipping are counted with every micro-batch, an update once
        flops = _of_sweep(recipe, pieces, prediction.flops, once=trace.updating)
        ops = _of_sweep(recipe, pieces, len(trace.ops), once=trace.updates)
        estimates[offload] = Estimate(
            recipe=replace(recipe, offload=offload),
            peak_bytes=prediction.peak_reserved_bytes,
            by_category=prediction.by_category,
            flops=flops,
            seconds=seconds_of(recipe, flops, ops, swapped),
        )
    return estimates


def _of_sweep(recipe: Recipe, pieces: float, found: int, *, once: int) -> int:
    """Flops or ops of a sweep, by those of a step on one of so many pieces of its batch."""
    return round(recipe.num_blocks * (pieces * (found - once) + once))


def swapped_bytes(found: dict[Offload, Prediction], recipe: Recipe) -> int:
    """Bytes that a sweep moves, with each block brought once and taken back."""
    every, one = (found[offload].by_category for offload in OFFLOAD)
    # off the device are the layers of all blocks but the largest
    depth = recipe.model.depth
    others = depth - -(depth // -recipe.num_blocks)
    return 2 * depth * sum(every[name] - one[name] for name in STATE) // max(1, others)


def seconds_of(recipe: Recipe, flops: int, ops: int, swapped: int) -> float:
    """Of a sweep, by the formula above."""
    float32, bfloat16, link = recipe.device.speeds
    working = flops / (SHARE * (bfloat16 if recipe.autocast else float32)) + ops * OP_SECONDS
    swapping = swapped / (SHARE * link)
    steps = fewest_steps_per_swap(working / recipe.num_blocks, swapping / recipe.num_blocks)
    return working + swapping / steps


@dataclass(frozen=True)
class Found:
    """The plans of one number of blocks.

    Args:
        whole:     what computes nothing again and cuts no batch, all blocks on the device; it need
                   not fit
        plans:     the fastest that fits for each choice of what is on the device
        smallest:  of all that were predicted, whether it fits or not
    """

    whole: Estimate
    plans: list[Estimate]
    smallest: Estimate


@dataclass(frozen=True)
class Answer(Found):
    """The plans of every number of blocks, the fastest first; the whole is end to end.

    Args:
        largest:  the family's largest preset of which something fits; None where there is none
        outside:  bytes of the stem and the head, by category
    """

    largest: str | None
    outside: dict[str, int]


def context_bytes(device: Target) -> int:
    """Bytes of a device that no tensor can have."""
    return CONTEXT if device.is_gpu else 0


def counts_of(depth: int) -> list[int]:
    """Numbers of blocks that are tried: those that cut the layers evenly, and COUNTS."""
    return [n for n in range(1, depth + 1) if depth % n == 0 or n in COUNTS]


def search(
    recipe: Recipe,
    memory: int,
    told: Callable[[int, int, Found | None], None] = lambda done, total, found: None,
) -> Answer:
    """Every number of blocks, recompute policy, micro-batch and offload that may be the fastest.

    Args:
        recipe:  of a preset of its family; what is searched for takes the place of its own
        memory:  bytes of its device
        told:    called with how many of how many parts of the search are done, and the plans of
                 one number of blocks where those were the last part
    """
    limit, depth = memory - context_bytes(recipe.device), recipe.model.depth
    counts = counts_of(depth)
    presets = family_named(recipe.family).model.presets
    by_size = sorted(presets, key=lambda n: -presets[n].depth * presets[n].dim ** 2)
    # what needs the least
    least = policies_of(mixed=recipe.autocast)[-1]
    jobs: list[Callable[[], Found | Estimates]] = [
        partial(plans_of, replace(recipe, num_blocks=n), estimate, limit) for n in counts
    ]
    for name in by_size:
        model = presets[name]
        small = replace(recipe, preset=name, model=model, num_blocks=model.depth)
        small = replace(small, recompute=least, accumulate=recipe.share)
        jobs.append(partial(estimate, small))
    found: list[Found] = []
    of_presets: list[Estimates] = []
    layers = PREDICTIONS * sum(depth // n for n in counts)
    for done, part in enumerate(results(jobs, most=None if layers > ALONE else 1), start=1):
        if isinstance(part, Found):
            found.append(part)
        else:
            of_presets.append(part)
        told(done, len(jobs), part if isinstance(part, Found) else None)
    needed = dict(zip(by_size, of_presets, strict=True))
    fits = (name for name in by_size if _smallest(needed[name].values()).peak_bytes <= limit)
    return Answer(
        whole=found[0].whole,
        plans=sorted((plan for each in found for plan in each.plans), key=attrgetter("seconds")),
        smallest=_smallest(each.smallest for each in found),
        largest=next(fits, None),
        outside=outside_layers(found[0].whole),
    )


def plans_of(recipe: Recipe, predict: Callable[[Recipe], Estimates], limit: int) -> Found:
    """The fastest plans of a recipe's number of blocks.

    A micro-batch needs less than a larger one, and a policy less than the one before: each policy's
    largest micro-batch that fits is found by few predictions, and policies that are too slow even
    with a whole batch are left out.

    Args:
        recipe:   whose policy, micro-batch and offload are searched for
        predict:  what a recipe needs; asked once for each
        limit:    bytes that a plan may take
    """
    known: dict[Recipe, Estimates] = {}

    def planned(offload: Offload, recompute: Recompute, micro_batch: int) -> Estimate:
        pieces = recipe.share // micro_batch
        chosen = replace(recipe, recompute=recompute, accumulate=pieces)
        if chosen not in known:
            known[chosen] = predict(chosen)
        return known[chosen][offload]

    whole = planned("none", "none", recipe.share)
    # with one block all is on the device in any case
    offloads = recipe.offloads[:1] if recipe.num_blocks == 1 else recipe.offloads
    best = [_fastest(partial(planned, offload), recipe, limit) for offload in offloads]
    smallest = _smallest(plan for plans in known.values() for plan in plans.values())
    return Found(whole, [plan for plan in best if plan], smallest)


def _fastest(
    planned: Callable[[Recompute, int], Estimate], recipe: Recipe, limit: int
) -> Estimate | None:
    """The fastest plan that fits of all policies and micro-batches; None where there is none."""
    batch, policies = recipe.share, policies_of(mixed=recipe.autocast)
    whole = planned("none", batch)
    if whole.peak_bytes <= limit:
        return whole
    if planned(policies[-1], 1).peak_bytes > limit:
        return None
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    best: Estimate | None = None
    slow: list[Recompute] = []  # policies that take longer than the best with a whole batch too
    for recompute in policies:
        if any(_redoes(recompute, other) for other in slow):
            continue
        if best and planned(recompute, batch).seconds >= best.seconds:
            slow.append(recompute)
            continue
        worth = sizes
        if best and best.recipe.recompute is not None:
            # with no smaller micro-batch, nor the same where it computes more, it may be faster
            more = _redoes(recompute, best.recipe.recompute)
            worth = sizes[bisect_left(sizes, best.recipe.micro_batch) + more :]
        plan = _largest(worth, partial(planned, recompute), limit)
        if plan and (best is None or plan.seconds < best.seconds):
            best = plan
    return best


def _redoes(recompute: Recompute, other: Recompute) -> bool:
    """Whether a policy computes all again that another does."""
    return POLICIES[recompute].keeps <= POLICIES[other].keeps


def _largest(
    sizes: Sequence[int], planned: Callable[[int], Estimate], limit: int
) -> Estimate | None:
    """The plan of the largest micro-batch that fits; None where the smallest does not."""
    best, low, high = None, -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    place = high - 1
    while high - low > 1:
        plan = planned(sizes[place])
        if plan.peak_bytes <= limit:
            best, low = plan, place
        else:
            high = place
        # the largest size that fits if what grows with it were all in proportion
        growing = sum(plan.by_category[name] for name in GROWING)
        room = (limit - (plan.peak_bytes - growing)) / max(1, growing)
        guess = bisect_right(sizes, plan.recipe.micro_batch * room) - 1
        place = min(max(guess, low + 1), high - 1)
    return best


def outside_layers(whole: Estimate) -> dict[str, int]:
    """Bytes of the stem and the head, which no number of blocks divides: each of STATE.

    Args:
        whole:  of a model with all blocks on the device; where parameters are shared out, it is a
                device's share
    """
    recipe, config = whole.recipe, whole.recipe.config()
    devices = recipe.data_parallel if recipe.shard else 1
    with torch.device("meta"):
        blocks = config.build("meta")
        inside = set(map(id, blocks.model.layers.parameters()))
        outside = {n: p for n, p in blocks.named_parameters() if id(p) not in inside}
        trained = {name: p for name, p in outside.items() if p.requires_grad}
        kind = OPTIMIZERS[config.trainer.optimizer]
        group = ParamGroup(trained, config.trainer, total=1, device=blocks.device, kind=kind)
    return {
        "parameters": sum(p.nbytes for p in outside.values()) // devices,
        "optimizer": sum(t.nbytes for t in group.optimizer_tensors().values()) // devices,
    }


def shares(plan: Estimate, outside: dict[str, int]) -> dict[str, int]:
    """What fills a device at the peak, in bytes that add up to it.

    Args:
        plan:     that was found
        outside:  of `outside_layers`
    Returns:
        Each of CATEGORIES without the stem's and the head's share of STATE; that share; and what
        the allocator holds free.
    """
    layers = {name: plan.by_category[name] - outside.get(name, 0) for name in CATEGORIES}
    free = plan.peak_bytes - sum(plan.by_category.values())
    return {**layers, "stem_and_head": sum(outside.values()), FREE: free}
