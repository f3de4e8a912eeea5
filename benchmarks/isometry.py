"""How far a classifier's layers space the classes as its answers do: a sweep over its layers.

    r(layer) = Pearson(|a_j - a_k|, |b_j - b_k|)        over all pairs of classes j < k
    a_k      = mean over class k of PCA(activation of the label token after the layer)
    b_k      = mean over class k of PCA(sqrt(softmax(logits)))

Behavioural isometry, of arXiv:2605.05115 and the public notebook that repeats it. The distance of
two square roots is Hellinger's but for a factor. Layer 0 is the stream before the first layer.

    python benchmarks/isometry.py RUN [RUN ...]

A run is one of `train vit`. With --num-blocks 1 --sigma-min 79 it has the most noise alone and is
the ordinary classifier. No label is read but to tell the classes apart.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import tyro
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.stats import pearsonr
from show import rich_table
from torch import Tensor, nn
from tyro.conf import Positional

from dbkernels import DiffusionBlocks, Draw, open_data
from dbkernels.cli.table import plain_console
from dbkernels.data.images import Data
from dbkernels.models.vit import ViT
from dbkernels.settings import check_choice, check_number
from dbkernels.training.run import load_run

Mode = Literal["trajectory", "within"]
MOST_AXES = 64  # of a PCA, as in the notebook
LEAST_CLASSES = 3  # fewer have one distance, which correlates with nothing
PERMUTATIONS = 1000
BATCH = 256
# distances that differ by less, as a share of the largest number, are rounding
FLAT = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Isometry:
    """r of one layer beside its null; all are 0, and p is 1, where a side has equal distances.

    r:     in [-1, 1]
    low, median, high:  5th, 50th and 95th percentile of r where the classes of one side change
           places (Mantel 1967)
    p:     share of such r that are at least r, itself counted
    """

    r: float
    low: float
    median: float
    high: float
    p: float


@dataclass(frozen=True)
class Sweep:
    """r of a stack of layers; lists have one place for each, in the order in which they run.

    mode:    as that of `sweep`
    layers:  from 1, and 0 first for the stream before them
    block:   that runs the layer; the first one for layer 0
    r, null_low, null_median, null_high, p:  as those of `Isometry`
    """

    mode: Mode
    layers: tuple[int, ...]
    block: tuple[int, ...]
    r: tuple[float, ...]
    null_low: tuple[float, ...]
    null_median: tuple[float, ...]
    null_high: tuple[float, ...]
    p: tuple[float, ...]


def isometry(
    activations: np.ndarray, behaviours: np.ndarray, labels: np.ndarray, *, seed: int = 0
) -> Isometry:
    """Compare the distances of the classes in activations with those in behaviours.

    The pairs of ten classes are 45, but they share ten centroids and are not independent: the p
    value of a plain correlation would be too small. The null gives the classes of the activations
    other places instead, and all pairs of a class move together.

    Args:
        activations:  (N, D)
        behaviours:   (N, C)
        labels:       (N,)  whole numbers
        seed:         of the permutations
    Raises:
        ValueError: the sizes disagree, a number is not finite, or there are too few classes.
    """
    shapes = activations.shape, behaviours.shape, labels.shape
    if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "activations, behaviours and labels must be (N, D), (N, C) and (N,), "
            f"got {', '.join(map(str, shapes))}"
        )
    if not (np.isfinite(activations).all() and np.isfinite(behaviours).all()):
        raise ValueError("activations and behaviours must be finite, got others among them")
    classes = len(np.unique(labels))
    if classes < LEAST_CLASSES:
        raise ValueError(f"labels must be of at least {LEAST_CLASSES} classes, got {classes}")
    first, second = (_distances(points, labels) for points in (activations, behaviours))
    if not (first.any() and second.any()):
        return Isometry(0.0, 0.0, 0.0, 0.0, 1.0)
    r = float(pearsonr(first, second).statistic)
    rng = np.random.default_rng(seed)
    places = rng.permuted(np.tile(np.arange(classes), (PERMUTATIONS, 1)), axis=1)
    j, k = np.triu_indices(classes, 1)  # the order of pdist
    moved = squareform(first)[places[:, j], places[:, k]]
    null = 1 - cdist(moved, second[None], "correlation")[:, 0]
    low, median, high = np.percentile(null, (5, 50, 95)).tolist()
    # a permutation that moves nothing has r itself but for rounding
    as_large = int((null >= r - 1e-9).sum())
    return Isometry(r, low, median, high, (1 + as_large) / (1 + PERMUTATIONS))


def _distances(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each pair of classes, in the order of pdist; all 0 where they do not differ."""
    centred = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:MOST_AXES]
    projected = centred @ axes.T
    centroids = [projected[labels == label].mean(0) for label in np.unique(labels)]
    distances = pdist(np.stack(centroids))
    flat = np.ptp(distances) <= FLAT * np.abs(points).max()
    return np.zeros_like(distances) if flat else distances


def seams(r: Sequence[float], parts: int) -> tuple[int, ...]:
    """Where to cut a stack of layers: between neighbours whose r differ most.

    A cut after layer k has the change |r[k + 1] - r[k]|, of the last layer before it and the first
    one behind it. The parts - 1 largest are cut, of equal ones the earlier; r[0], of the stream
    before all layers, is in none. A part may have one layer alone.

    Args:
        r:      of layers 0 to L, as `Sweep` has them, or its mean over seeds
        parts:  1 to L
    Returns:
        How many layers stand before each cut, ascending; `split_at` makes a split of them.
    """
    depth = len(r) - 1
    check_number("parts", parts, 1, depth)
    changes = np.abs(np.diff(np.asarray(r, dtype=np.float64)[1:]))
    largest = np.argsort(-changes, kind="stable")[: parts - 1]
    return tuple(sorted((largest + 1).tolist()))


def split_at(cuts: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers of each part of a stack with cuts, as `DiffusionBlocks` takes its split."""
    return tuple(after - before for before, after in pairwise((0, *cuts, depth)))


def sweep(
    blocks: DiffusionBlocks, data: Data, *, mode: Mode, seed: int = 0, samples: int = 1000
) -> Sweep:
    """r of every layer on images, each block at one Euler step of a walk from z = 0.

    On the trajectory the levels cross the same mass of the prior, as those of the library's
    sampler do, and the behaviour of all layers is the last step's answer. Within a block the level
    halves the mass of the block's interval, and the behaviour is that step's own answer. Of one
    block at the most noise both are one step, and almost the same.

    Every block reads the image anew, so r may fall where a block begins. Before all layers the
    token is the same for every image, and r is 0.

    Args:
        blocks:   of a `ViT`, trained
        data:     labelled images that they have not seen
        mode:     trajectory, or within
        seed:     of the permutations of the null
        samples:  at most so many images, evenly spaced
    Raises:
        ValueError: the model is another, the mode is unknown, there are no samples, or they are of
            too few classes.
    """
    check_choice("mode", mode, get_args(Mode))
    check_number("samples", samples, 1)
    if not isinstance(blocks.model, ViT):
        raise ValueError(f"blocks must be of a ViT, got {type(blocks.model).__name__}")
    places = torch.arange(min(samples, len(data)), dtype=torch.int64)
    streams, steps, labels = read_out(blocks, data, places * len(data) // len(places), mode)
    order = [block for block in blocks for _ in block.layers]
    of_layers = [order[0], *order]
    behaviours = [logits.softmax(-1).sqrt().numpy() for logits in steps]
    found = [
        isometry(stream.numpy(), behaviours[block.index], labels.numpy(), seed=seed)
        for stream, block in zip(streams, of_layers, strict=True)
    ]
    return Sweep(
        mode=mode,
        layers=(0, *(layer + 1 for block in blocks for layer in block.layers)),
        block=tuple(block.index for block in of_layers),
        r=tuple(each.r for each in found),
        null_low=tuple(each.low for each in found),
        null_median=tuple(each.median for each in found),
        null_high=tuple(each.high for each in found),
        p=tuple(each.p for each in found),
    )


def read_out(
    blocks: DiffusionBlocks, data: Data, indices: Tensor, mode: Mode
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The label token before the first layer and after each, and what every layer's step answers.

    Returns:
        L + 1 of (N, D), logits (N, C) of each block, and labels (N,): float64 and int64, on the
        host. On the trajectory the logits are those of the last step.
    """
    levels, device = walk(blocks, mode), blocks.device
    found: list[list[Tensor]] = []
    answers, labels = [], []
    for some in indices.split(BATCH):
        batch = data.batch(some, lambda tensor: tensor.to(device))
        with recorded(blocks) as streams:
            steps = blocks.predictions(batch, levels, Draw(0, step=0))
        found.append(streams)
        answers.append([step.double().cpu() for step in steps])
        labels.append(batch["label"].cpu())
    logits = [torch.cat(step) for step in zip(*answers, strict=True)]
    if mode == "trajectory":
        logits = [logits[-1]] * len(logits)
    return [torch.cat(each) for each in zip(*found, strict=True)], logits, torch.cat(labels)


def walk(blocks: DiffusionBlocks, mode: Mode) -> list[float]:
    """One level of each block, descending.

    On the trajectory it is at a quantile of the block's interval such that blocks of equal mass
    have the grid of the library's sampler, and those of another scheme one step each as well.
    """
    last = len(blocks) - 1
    levels = []
    for block in blocks:
        share = 0.5 if mode == "within" else 1 - block.index / max(last, 1)
        u = torch.tensor([share], dtype=torch.float64)
        levels.append(blocks.process.level_at(block.noise, u).item())
    return levels


@contextmanager
def recorded(blocks: DiffusionBlocks) -> Iterator[list[Tensor]]:
    """The label token (B, D) before the first layer that runs, and after each one as it runs."""
    seen: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        for x in (out,) if seen else (args[0], out):
            seen.append(x[:, 0].to("cpu", torch.float64, copy=True))

    layers = dict.fromkeys(layer for block in blocks for layer in blocks.of(block).layers)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class OfRuns:
    """Print r of every layer of some runs of a classifier, in both modes."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs."""
    seed: int = 0
    """Of the permutations."""
    samples: int = 1000
    """At most so many images of those to test on."""

    def run(self) -> None:
        for directory in self.runs:
            config, blocks = load_run(directory, device="cpu")
            data = open_data(config.data, "test", config.model.num_classes)
            told = {"seed": self.seed, "samples": self.samples}
            found = [sweep(blocks, data, mode=mode, **told) for mode in get_args(Mode)]
            console = plain_console()
            console.print(rich_table(table(found), f"{directory.name}: r of each layer", ABOUT))


ABOUT = "In brackets: r of permuted classes, 5th to 95th percentile. p: share of them as large."


def table(sweeps: Sequence[Sweep]) -> list[list[str]]:
    """Lines of a table: a line for each layer, and r and p of each sweep."""
    lines = [["layer", "block", *(name for each in sweeps for name in (each.mode, "p"))]]
    for place, (layer, block) in enumerate(zip(sweeps[0].layers, sweeps[0].block, strict=True)):
        cells = []
        for each in sweeps:
            null = f"[{each.null_low[place]:.2f}, {each.null_high[place]:.2f}]"
            cells += [f"{each.r[place]:.3f} {null}", f"{each.p[place]:.3f}"]
        lines.append([str(layer), str(block), *cells])
    return lines


if __name__ == "__main__":
    try:
        tyro.cli(OfRuns).run()
    except ValueError as error:
        sys.exit(str(error))
