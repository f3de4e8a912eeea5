"""What a partition of a network will be worth, by short runs of it in one block.

A run of one block has a loss at every level of noise. A block of a partition has fewer layers. But
all its samples are at its own levels, and the stem and the head learn from the steps of all blocks:

    loss of the block at a level = f(level) * (n / L)**-a * d**-c,    d = min(sqrt(B / m), 3)

    f     the loss of the run that has most layers and most steps, in which all of them see all
    n, L  layers of the block, and of that run
    d     times as many samples, up to MOST_TIMES: the mean, of factors, of the B times that the
          stem and the head see and of the 1 / m that its layers see at each of its levels, where m
          is the share of the run's prior in its interval. With equal probability both are B
    a, c  how fast a loss falls with layers, and with these samples

What is assumed:

- every layer is updated as often as in the run, by batches of its size, on a schedule of its form;
- a and c are the same at all levels, and there is no loss that cannot be undercut: they are slopes
  of the whole loss, near where it was measured;
- a is measured by runs that differ in depth, and c is KEPT of the slope by steps, which runs show
  that differ in them. Where one of both is not measured, c is RATIO of a; of one run, a is DEPTH;
- blocks with copies of the stem and the head are taken to be as good as those that share them;
- a block is worth as much beside layers of others that it reads as without them.

KEPT and MOST_TIMES were chosen on small runs: 12 layers that classify digits, and that draw them,
in 2, 3, 4 and 6 blocks, by runs of a third of the layers and a third of the steps, and 6 layers
that fill gaps of a text in 3. More blocks than three gained nothing from their samples there, which
no run of one block can tell. docs/studies.md has what was predicted and what came. One run alone
tells nothing of a and c, so what it says of the number of blocks is only as good as DEPTH and
RATIO: by them, evenly split blocks get worse with their number.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dbkernels.data.spaced import Spaced
from dbkernels.diffusion.process import Interval, Process
from dbkernels.models.registry import family_named
from dbkernels.training.evaluation import Passes, Told
from dbkernels.training.partition import Block
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig, read_config

LEVELS = 24  # of a curve, beside the most noise
MOST = 512  # samples that it is read from
CELLS = 960  # parts of equal probability, in which a curve is summed up
FINE = 4001  # quantiles that a prior is read at
TINY = 1e-12  # share of a prior
MOST_TIMES = 3.0  # samples: of more no run has gained
DEPTH = 0.5  # a that nobody measured
RATIO = 0.5  # of c to a, where one of them is not measured
KEPT = 0.3  # of the exponent of steps
MOST_NAMES = 5  # of an error: more make one that nobody reads
FREE = "model depth", "trainer steps", "trainer seed"  # in which runs of one network may differ
EDGES = np.linspace(0, 1, CELLS + 1)
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean losses of a run of one block over its noise.

    config:         of the run
    losses:         (LEVELS,) float64, in the middle of parts of equal probability, the least noise
                    first; unweighted, but of masked tokens weighted as in their bound
    at_most_noise:  the loss at the highest level
    """

    config: RunConfig
    losses: np.ndarray
    at_most_noise: float

    @property
    def mean(self) -> float:
        """Over levels as they are drawn."""
        return float(self.losses.mean())

    def cells(self) -> np.ndarray:
        """(CELLS,) the losses in the middle of each cell, by lines between those that are known."""
        places = np.append((np.arange(LEVELS) + 0.5) / LEVELS, 1.0)
        return np.interp(MIDDLES, places, np.append(self.losses, self.at_most_noise))


@dataclass(frozen=True)
class Law:
    """Exponents a and c, and whether runs have shown them."""

    depth: float = DEPTH
    samples: float = RATIO * DEPTH
    depth_measured: bool = False
    samples_measured: bool = False


@dataclass(frozen=True)
class Predicted:
    """What a partition is predicted to be worth.

    config:         of the run that would train it
    loss:           mean over levels as the runs drew them
    at_most_noise:  at the highest level
    block_losses:   mean of each block over the levels that it serves, the most noise first
    to_learn:       share of the loss of the run of one block that lies at each block's levels: one
                    of a few percent has little to win, however many layers it has
    """

    config: RunConfig
    loss: float
    at_most_noise: float
    block_losses: tuple[float, ...]
    to_learn: tuple[float, ...]


def predicted(run_dirs: Sequence[Path], ways: Sequence[RunConfig]) -> list[Predicted]:
    """What partitions are predicted to be worth, by runs of one block.

    Args:
        run_dirs:  of the runs, which may differ in depth and steps
        ways:      of which the partition and the prior count
    Raises:
        ValueError: as `read_curves`.
    """
    curves = read_curves(run_dirs, device="cpu")
    law = law_of(curves)
    return [predict(longest(curves), law, way) for way in ways]


def read_curves(
    run_dirs: Sequence[Path],
    *,
    device: torch.device | str,
    told: Told = lambda done, total: None,
) -> list[Curve]:
    """The curves of runs, on held-out data.

    Args:
        run_dirs:  their directories, at least one
        device:    to evaluate on
        told:      called with how many levels are done, and of how many
    Raises:
        ValueError: there is no such run; one is named twice, has several blocks, no noise, or
            layers that run again and again, or has no checkpoint; or two differ in more than FREE.
    """
    if not run_dirs:
        raise ValueError("run_dirs must name at least one run, got none")
    directory, times = Counter(run_dirs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"run_dirs must name each run once, got {directory} twice")
    configs = [_checked(directory, read_config(directory)) for directory in run_dirs]
    for directory, config in zip(run_dirs, configs, strict=True):
        if other := _other_settings(configs[0], config):
            raise ValueError(
                f"{directory} must differ from {run_dirs[0]} in depth, steps and seed alone, got "
                f"another {', '.join(other[:MOST_NAMES])}"
            )
    passes = Passes(told, total=len(run_dirs) * (LEVELS + 1))
    return [_read(directory, device, passes) for directory in run_dirs]


def _checked(directory: Path, config: RunConfig) -> RunConfig:
    if config.objective != "blocks":
        raise ValueError(f"{directory} must be trained on noise, got a {config.objective} run")
    if family_named(config.family).recurs:
        raise ValueError(
            f"{directory} must be of a family that is cut into blocks, got {config.family}"
        )
    if (blocks := config.partition.num_blocks) != 1:
        raise ValueError(f"{directory} must be trained in one block, got {blocks}")
    return config


def _other_settings(first: RunConfig, second: RunConfig) -> list[str]:
    """Names of settings that differ, but for those of FREE."""
    flat, other = map(_flat, (first, second))
    names = dict.fromkeys([*flat, *other])
    return [name for name in names if name not in FREE and flat.get(name) != other.get(name)]


def _flat(config: RunConfig) -> dict[str, object]:
    """Its settings, those of a part behind the part's name."""
    found: dict[str, object] = {}
    for name, value in asdict(config).items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name} {part}".strip(): each for part, each in parts.items()}
    return found


def _read(directory: Path, device: torch.device | str, passes: Passes) -> Curve:
    config, blocks = load_run(directory, device=device)
    data = Spaced(config.model.open(config.data, "test", convert=config.convert), MOST)
    process = blocks.process
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = process.level_at(process.range, middles).tolist()
    losses = []
    for level in (*levels, process.range.high):
        weight = 1.0
        if family_named(config.family).text == "masked":
            weight = float(process.weight(torch.tensor(level, dtype=torch.float64), None))
        losses.append(weight * blocks.loss_at(data, level))
        passes.made(1)
    return Curve(config, np.array(losses[:-1], dtype=np.float64), losses[-1])


def longest(curves: Sequence[Curve]) -> Curve:
    """Of the runs with most layers, and of these with most steps, the mean."""
    most = max(map(_size, curves))
    alike = [curve for curve in curves if _size(curve) == most]
    losses = np.mean([curve.losses for curve in alike], axis=0)
    noisiest = float(np.mean([curve.at_most_noise for curve in alike]))
    return replace(alike[0], losses=losses, at_most_noise=noisiest)


def _size(curve: Curve) -> tuple[int, int]:
    return curve.config.model.depth, curve.config.trainer.steps


def law_of(curves: Sequence[Curve]) -> Law:
    """The exponents that runs show: least squares of ln(mean loss) by ln(depth) and ln(steps).

    Raises:
        ValueError: depth and steps change together, so that no run tells which of them counts.
    """
    sizes = np.array(list(map(_size, curves)))
    centred = np.log(sizes) - np.log(sizes).mean(0)
    varied = np.ptp(sizes, axis=0) > 0
    if np.linalg.matrix_rank(centred) < varied.sum():
        raise ValueError(
            "runs must differ in depth at the same steps, or in steps at the same depth, "
            f"got depth and steps {', '.join(f'{depth} and {steps}' for depth, steps in sizes)}"
        )
    losses = np.log([curve.mean for curve in curves])
    slopes = np.linalg.lstsq(centred, losses - losses.mean(), rcond=None)[0]
    depth, steps = (float(-slope) for slope in slopes)
    known = bool(varied[0]), bool(varied[1])
    if known == (False, False):
        return Law()
    a = depth if known[0] else steps * KEPT / RATIO
    return Law(a, steps * KEPT if known[1] else a * RATIO, *known)


def predict(curve: Curve, law: Law, way: RunConfig) -> Predicted:
    """What a partition is predicted to be worth.

    Args:
        curve:  of the run of one block
        law:    its exponents
        way:    whose partition and prior count, at the depth of the run
    """
    prior = curve.config.prior
    blocks = way.partition.cut(curve.config.model.depth, way.prior)
    depths = np.array([len(block.layers) for block in blocks])
    masses = _masses(prior, blocks)
    times = np.minimum(np.sqrt(len(blocks) / masses), MOST_TIMES)
    worth = (depths / depths.sum()) ** -law.depth * times**-law.samples
    shares = to_learn(curve, blocks)
    parts = curve.cells().mean() * np.array(shares) * worth
    return Predicted(
        config=way,
        loss=float(parts.sum()),
        at_most_noise=curve.at_most_noise * float(worth[0]),
        block_losses=tuple((parts / masses).tolist()),
        to_learn=shares,
    )


def mean_loss(prior: Process, way: RunConfig, block_losses: Sequence[float]) -> float:
    """The figure that `predict` predicts, of blocks that were trained and evaluated.

    Args:
        prior:         of the run of one block
        way:           the run of the blocks
        block_losses:  mean of each over the levels that it serves, as `Evaluation` has them
    """
    masses = _masses(prior, way.partition.cut(way.model.depth, way.prior))
    return float(np.average(block_losses, weights=masses))


def to_learn(curve: Curve, blocks: Sequence[Block]) -> tuple[float, ...]:
    """Share of a curve's integral at the levels of each block."""
    summed = np.append(0.0, np.cumsum(curve.cells()))
    ends = [
        np.interp(_ends(curve.config.prior, block.noise), EDGES, summed / summed[-1])
        for block in blocks
    ]
    return tuple(float(high - low) for low, high in ends)


def _masses(prior: Process, blocks: Sequence[Block]) -> np.ndarray:
    """(B,) shares of a prior at the levels of each block, none of them 0."""
    return np.array([np.diff(_ends(prior, block.noise))[0] for block in blocks]).clip(TINY)


def _ends(prior: Process, interval: Interval) -> np.ndarray:
    return share_below(prior, np.array([interval.low, interval.high]))


def share_below(prior: Process, levels: np.ndarray) -> np.ndarray:
    """Share of a prior, as training draws from it, below each of some levels, float64."""
    shares = torch.linspace(0, 1, FINE, dtype=torch.float64)
    return np.interp(levels, prior.level_at(prior.range, shares).double().numpy(), shares.numpy())
