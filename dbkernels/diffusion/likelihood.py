"""What blocks of a text model are worth in nats per token: bounds from their measured curves.

Masked tokens, each block over the times that it serves itself (Shi et al. 2024, arXiv:2406.04329):

    -ln p <= sum of blocks of the integral of weight E loss dt  +  (1 - alpha(0)) ln V

One Gaussian token e given clean context, for any stop level s (Guo, Shamai & Verdu 2005; Kingma et
al. 2021, arXiv:2107.00630), where D is the expected row under the answered probabilities:

    -ln p <= integral of E |e - D|**2 sigma**-2 d ln sigma above s  +  E CE(s)  +  |e|**2 / (2 S**2)

with S the greatest level. For an exact posterior the sum is the entropy, whatever s is. Both sums
are of parts that belong to one block each, so the nats of blocks can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dbkernels.diffusion.masked import Masked
from dbkernels.diffusion.process import Interval
from dbkernels.settings import check_number


@dataclass(frozen=True)
class MaskedBound:
    """Nats per token: what each block adds, the most masked first, and what no block sees."""

    blocks: tuple[float, ...]
    reconstruction: float
    """Of the tokens that are masked at time 0, at ln V each."""

    @property
    def nats(self) -> float:
        """The bound."""
        return sum(self.blocks) + self.reconstruction


def masked_bound(
    process: Masked,
    intervals: Sequence[Interval],
    levels: Sequence[Tensor],
    losses: Sequence[Tensor],
    vocabulary: int,
) -> MaskedBound:
    """The bound of masked blocks from losses at levels that `process.level_at` spread evenly.

    As in MD4, no term stands for alpha(1), which is eps and not 0: it would add eps ln V.

    Args:
        process:     the noise
        intervals:   that the blocks serve, not widened; they tile the process's range
        levels:      (N,) of each block: of uniform or of equally spaced quantiles of its interval
        losses:      (N,) of each block at these: the sum of the masked tokens' cross-entropies over
                     the number of tokens, in nats, unweighted
        vocabulary:  number of tokens that there are
    Raises:
        ValueError: the intervals do not tile the range, a block has no loss or not one for each
            level, or the vocabulary is empty.
    """
    check_number("vocabulary", vocabulary, 1)
    _check_tiled([(i.high, i.low) for i in intervals], process.range)
    blocks = []
    for interval, level, loss in zip(intervals, levels, losses, strict=True):
        if level.shape != loss.shape or not level.numel():
            raise ValueError(
                "a block must have at least one level and a loss for each, "
                f"got {tuple(level.shape)} levels and {tuple(loss.shape)} losses"
            )
        weighted = process.weight(level.double(), None) * loss.double()
        blocks.append(process.duration(interval) * float(weighted.mean()))
    return MaskedBound(tuple(blocks), process.range.low * math.log(vocabulary))


@dataclass(frozen=True)
class Curve:
    """Means over tokens that one block measured, at levels that cover all that it serves.

    levels:         sigma, descending, both ends of the block's interval among them
    errors:         at each, |e - D|**2 of the clean row e and the expected row D
    cross_entropy:  at each, in nats
    """

    levels: Sequence[float]
    errors: Sequence[float]
    cross_entropy: Sequence[float]

    def __post_init__(self) -> None:
        counts = len(self.levels), len(self.errors), len(self.cross_entropy)
        if len(set(counts)) > 1 or counts[0] < 2:
            raise ValueError(
                "a curve needs at least 2 levels, and an error and a cross-entropy at each, "
                f"got {counts[0]}, {counts[1]} and {counts[2]}"
            )
        if not all(np.diff(self.levels) < 0) or not self.levels[-1] > 0:
            raise ValueError(
                f"levels of a curve must be descending and positive, got {list(self.levels)}"
            )

    def nats_above(self) -> np.ndarray:
        """At each level the integral from there to the first, of errors / sigma**2 over ln sigma.

        Between two levels it is that of the cubic with the values and the slopes at both, where a
        slope is that of a parabola through three levels.
        """
        x = np.log(np.asarray(self.levels, dtype=np.float64))
        y = np.asarray(self.errors, dtype=np.float64) * np.exp(-2 * x)
        slope, h = np.gradient(y, x, edge_order=2 if len(x) > 2 else 1), -np.diff(x)
        parts = h / 2 * (y[1:] + y[:-1]) + h**2 / 12 * (slope[1:] - slope[:-1])
        return np.concatenate([[0.0], np.cumsum(parts)])


@dataclass(frozen=True)
class GaussianBound:
    """Nats per token of Gaussian blocks, at every level where the bound may stop.

    levels:              sigma, descending; where two blocks meet, once for each
    nats:                the bound that stops at each
    cross_entropy:       at each, of one answer there
    blocks:              the integral over each block's own levels, the most noise first
    """

    levels: tuple[float, ...]
    nats: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    blocks: tuple[float, ...]

    @property
    def best(self) -> tuple[float, float]:
        """The stop level with the least bound, one for the whole data, and that bound."""
        nats, level = min(zip(self.nats, self.levels, strict=True))
        return level, nats

    @property
    def down_to_least(self) -> float:
        """The bound with every block in it, which stops at the least level."""
        return self.nats[-1]

    @property
    def at_most_noise(self) -> float:
        """Cross-entropy at the greatest level: exact for a sampler that asks once, there."""
        return self.cross_entropy[0]


def gaussian_bound(curves: Sequence[Curve], *, squared_norm: float = 1.0) -> GaussianBound:
    """The bound of Gaussian blocks, at every stop level.

    Args:
        curves:        of the blocks, the most noise first; each begins where the one before ends
        squared_norm:  |e|**2 of a clean row
    Raises:
        ValueError: there is no curve, or one does not begin where the one before ends.
    """
    _check_tiled([(c.levels[0], c.levels[-1]) for c in curves])
    above, nats, blocks = 0.0, [], []
    beyond = squared_norm / (2 * curves[0].levels[0] ** 2)
    for curve in curves:
        integral = curve.nats_above()
        nats.extend(above + integral + np.asarray(curve.cross_entropy) + beyond)
        blocks.append(float(integral[-1]))
        above += integral[-1]
    levels = tuple(float(level) for curve in curves for level in curve.levels)
    entropies = tuple(float(x) for curve in curves for x in curve.cross_entropy)
    return GaussianBound(levels, tuple(map(float, nats)), entropies, tuple(blocks))


def _check_tiled(ends: Sequence[tuple[float, float]], whole: Interval | None = None) -> None:
    """Whether blocks, as (high, low), follow each other without gap, down a whole range."""
    meet = all(ends[b][1] == ends[b + 1][0] for b in range(len(ends) - 1))
    covers = whole is None or (ends and (ends[-1][1], ends[0][0]) == (whole.low, whole.high))
    if not ends or not meet or not covers:
        raise ValueError(f"blocks must tile the levels from the most noise down, got {list(ends)}")
