"""Partitions that are worth a prediction: numbers of blocks, schemes and splits of one network."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import get_args

import numpy as np
from scipy.optimize import minimize

from dbkernels.diffusion.process import Process, Scheme
from dbkernels.models.registry import family_named
from dbkernels.planning.quality import EDGES, Curve, share_below
from dbkernels.training.run_config import PartitionConfig, RunConfig

COUNTS = 1, 2, 3, 4, 6  # of blocks, where they cut the layers evenly
EVEN: Scheme = "equal_probability"
WIDEST = math.log(4)  # of a prior that is fitted: its deviation is so much wider, or narrower
FARTHEST = 3  # and its mean is moved by so many deviations, at most
DIGITS = 3  # of its numbers
SIMPLEX = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.3]])  # moves of both that the fit starts with


def ways_of(curve: Curve) -> list[RunConfig]:
    """Runs of the network of a curve that differ in how it is cut, one block first.

    Every scheme of its noise with layers split evenly; the prior whose blocks of equal probability
    have equal shares of the loss, where there is one; and two uneven splits, with more layers for
    the most noise and for the least.
    """
    config, depth = curve.config, curve.config.model.depth
    layers = len(config.partition.cut(depth, config.prior)[0].layers)
    ways = [config]
    for count in (count for count in COUNTS[1:] if layers % count == 0):
        for scheme in get_args(Scheme):
            partition = replace(config.partition, num_blocks=count, scheme=scheme, split="")
            if _exists(partition, depth, config.prior):
                ways.append(replace(config, partition=partition))
        even = replace(config.partition, num_blocks=count, scheme=EVEN, split="")
        fitted = equal_loss(curve, count)
        if fitted not in (None, config.prior) and _exists(even, depth, fitted):
            ways.append(replace(config, partition=even, prior=fitted))
        for split in uneven(layers, count):
            cut = replace(even, split=",".join(map(str, split)))
            ways.append(replace(config, partition=cut))
    return ways


def _exists(partition: PartitionConfig, depth: int, prior: Process) -> bool:
    """Whether a process has a scheme, with levels of its own for every block."""
    try:
        partition.cut(depth, prior)
    except ValueError:
        return False
    return True


def uneven(layers: int, count: int) -> Iterator[tuple[int, ...]]:
    """Splits that fall from the first block to the last, and rise: (6, 4, 2) and (2, 4, 6)."""
    even = layers // count
    if count == 1 or even == 1:
        return
    moved = np.linspace(even // 2, -(even // 2), count).astype(int)
    falling = tuple(int(even + more) for more in moved)
    yield falling
    yield falling[::-1]


def content(curve: Curve) -> np.ndarray:
    """(CELLS,) what there is to learn in each part of equal probability, which adds up to 1.

    It is the loss. But of a text with Gaussian noise it is the fall of the cross-entropy: for
    perfect predictions that is the information which the noise at these levels still hides.
    """
    losses = curve.cells()
    if family_named(curve.config.family).text == "gaussian":
        losses = np.gradient(np.maximum.accumulate(losses)) + 1e-12
    return losses / losses.sum()


def equal_loss(curve: Curve, count: int) -> Process | None:
    """The prior whose blocks of equal probability have equal shares of what there is to learn.

    Its mean and standard deviation are fitted to the boundaries between them: with two or three
    blocks it meets them, with more it comes near. None where the noise has no such numbers.
    """
    prior = curve.config.prior
    names = {each.name for each in fields(prior)}
    if count == 1 or not {"mean", "std"} <= names or getattr(prior, "density", "") == "uniform":
        return None
    wanted = np.interp(np.arange(1, count) / count, np.append(0.0, content(curve).cumsum()), EDGES)
    mean, std = (getattr(prior, name) for name in ("mean", "std"))

    def fitted(moved: np.ndarray) -> Process:
        wider = float(np.clip(moved[1], -WIDEST, WIDEST)) if count > 2 else 0.0
        # digits that a flag shows
        return replace(
            prior,
            mean=round(mean + float(np.clip(moved[0], -FARTHEST * std, FARTHEST * std)), DIGITS),
            std=round(std * math.exp(wider), DIGITS),
        )

    def misses(moved: np.ndarray) -> float:
        try:
            blocks = fitted(moved).intervals(count, EVEN)
        except ValueError:
            return math.inf
        found = share_below(prior, np.array([block.low for block in blocks[-2::-1]]))
        return float(np.square(found - wanted).sum())

    # two blocks have one boundary, which tells one number
    simplex = SIMPLEX if count > 2 else SIMPLEX[:2, :1]
    found = minimize(misses, simplex[0], method="Nelder-Mead", options={"initial_simplex": simplex})
    return fitted(found.x)
