"""Which ways of training fit a device, the fastest first; all by prediction."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dbkernels.memory.allocator import Target
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.models.registry import family_named
from dbkernels.ops.layer.recompute import POLICIES, Recompute, policies_of
from dbkernels.planning.estimate import STATE, Estimate, estimate
from dbkernels.planning.pool import results
from dbkernels.planning.recipe import Recipe
from dbkernels.training.trainer_config import Offload

Predictor = Callable[[Recipe], dict[Offload, Estimate]]

CONTEXT = 2**29  # bytes that CUDA's context takes beside a run's tensors; differs by driver
FREE = "free_in_allocator"  # beside CATEGORIES
GROWING = ("inputs", "saved_activations", "temporaries", "workspaces")  # with the micro-batch


@dataclass(frozen=True)
class Found:
    """The plans of one number of blocks.

    Args:
        whole:     what computes nothing again and cuts no batch, all blocks on the device; it need
                   not fit
        fitting:   the fastest that fits for each choice of what is on the device
        smallest:  of all that were predicted, whether it fits or not
    """

    whole: Estimate
    fitting: list[Estimate]
    smallest: Estimate


@dataclass(frozen=True)
class Answer:
    """What was found.

    Args:
        whole:     end to end, nothing computed again, the batch not cut; it need not fit
        plans:     that fit, the fastest first
        smallest:  of all that were predicted
        largest:   the family's largest preset of which something fits; None where there is none
        outside:   bytes of the stem and the head, by category
    """

    whole: Estimate
    plans: list[Estimate]
    smallest: Estimate
    largest: str | None
    outside: dict[str, int]


def context_bytes(device: Target) -> int:
    """Bytes of a device that no tensor can have."""
    return CONTEXT if device.is_gpu else 0


def search(recipe: Recipe, memory: int) -> Answer:
    """Every number of blocks, recompute policy, micro-batch and offload that may be the fastest.

    Args:
        recipe:  of a preset of its family; what is searched for takes the place of its own
        memory:  bytes of its device
    """
    limit, depth = memory - context_bytes(recipe.device), recipe.model.depth
    counts = [count for count in range(1, depth + 1) if depth % count == 0]
    presets = family_named(recipe.family).model.presets
    by_size = sorted(presets, key=lambda n: -presets[n].depth * presets[n].dim ** 2)
    least = [_smallest(replace(recipe, preset=name, model=presets[name])) for name in by_size]
    jobs = [partial(plans_of, replace(recipe, num_blocks=n), estimate, limit) for n in counts]
    found = list(results([*jobs, *(partial(estimate, each) for each in least)], "predicting"))
    needed = dict(zip(by_size, found[len(jobs) :], strict=True))
    fits = (n for n in by_size if min(e.peak_bytes for e in needed[n].values()) <= limit)
    found = found[: len(jobs)]
    return Answer(
        whole=found[0].whole,
        plans=sorted((plan for each in found for plan in each.fitting), key=lambda p: p.seconds),
        smallest=min((each.smallest for each in found), key=lambda p: p.peak_bytes),
        largest=next(fits, None),
        outside=outside_layers(needed[recipe.preset], depth),
    )


def _smallest(recipe: Recipe) -> Recipe:
    """The recipe with the settings that need the least."""
    last = policies_of(mixed=recipe.autocast)[-1]
    return replace(
        recipe, num_blocks=recipe.model.depth, recompute=last, accumulate=recipe.batch_size
    )


def plans_of(recipe: Recipe, predict: Predictor, limit: int) -> Found:
    """The fastest plans of a recipe's number of blocks.

    A micro-batch needs less than a larger one, and a policy less than the one before: each policy's
    largest micro-batch that fits is found by few predictions, and policies that are too slow even
    with a whole batch are left out.

    Args:
        recipe:   whose policy, micro-batch and offload are searched for
        predict:  what a recipe needs; asked once for each
        limit:    bytes that a plan may take
    """
    known: dict[Recipe, dict[Offload, Estimate]] = {}

    def planned(offload: Offload, recompute: Recompute, micro_batch: int) -> Estimate:
        pieces = recipe.batch_size // micro_batch
        chosen = replace(recipe, recompute=recompute, accumulate=pieces)
        if chosen not in known:
            known[chosen] = predict(chosen)
        return known[chosen][offload]

    whole = planned("none", "none", recipe.batch_size)
    # with one block all is on the device in any case
    offloads = ("none",) if recipe.num_blocks == 1 else ("none", "cpu")
    best = [_fastest(partial(planned, offload), recipe, limit) for offload in offloads]
    every = [plan for plans in known.values() for plan in plans.values()]
    smallest = min(every, key=lambda plan: plan.peak_bytes)
    return Found(whole, [plan for plan in best if plan], smallest)


def _fastest(
    planned: Callable[[Recompute, int], Estimate], recipe: Recipe, limit: int
) -> Estimate | None:
    """The fastest plan that fits of all policies and micro-batches; None where there is none."""
    batch, policies = recipe.batch_size, policies_of(mixed=recipe.autocast)
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
        if best:
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
        place = min(max(_guess(plan, sizes, limit), low + 1), high - 1)
    return best


def _guess(plan: Estimate, sizes: Sequence[int], limit: int) -> int:
    """Index of the largest size that fits if what grows with it were all in proportion."""
    growing = sum(plan.by_category[name] for name in GROWING)
    room = limit - (plan.peak_bytes - growing)
    return bisect_right(sizes, plan.recipe.micro_batch * room / max(1, growing)) - 1


def outside_layers(several: dict[Offload, Estimate], num_blocks: int) -> dict[str, int]:
    """Bytes of the stem and the head, which no number of blocks divides: each of STATE.

    Args:
        several:     of a recipe with more than one block
        num_blocks:  of that recipe
    """
    every, one = several["none"].by_category, several["cpu"].by_category
    return {name: one[name] - (every[name] - one[name]) // (num_blocks - 1) for name in STATE}


def shares(estimate: Estimate, outside: dict[str, int]) -> dict[str, int]:
    """What fills a device at the peak, in bytes that add up to it.

    Args:
        estimate:  of a plan
        outside:   of `outside_layers`
    Returns:
        Each of CATEGORIES without the stem's and the head's share of STATE; that share; and what
        the allocator holds free.
    """
    layers = {name: estimate.by_category[name] - outside.get(name, 0) for name in CATEGORIES}
    free = estimate.peak_bytes - sum(estimate.by_category.values())
    return {**layers, "stem_and_head": sum(outside.values()), FREE: free}
