"""The figures of a trained run: what a study's table shows of each family.

A figure is a number, or a list of numbers: one for each Euler step or block, in their order.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from judge import Judge
from show import Row
from torch import Tensor

from dbkernels import DiffusionBlocks, Draw
from dbkernels.data.images import Data
from dbkernels.models.registry import family_named
from dbkernels.training.evaluation import Evaluation
from dbkernels.training.run_config import RunConfig
from dbkernels.training.text_bits import TextEvaluation
from studies.scales import Scale


@dataclass(frozen=True)
class Sizes:
    """How much an evaluation reads and draws; more takes longer and is closer.

    images:  of the test split that a classifier answers on, evenly spaced
    starts:  from noise, whose answers are averaged
    drawn:   images that a generator draws, in equal parts of each class
    levels:  of the sampler that draws them
    windows: of the test split of a text
    """

    images: int = 1000
    starts: int = 4
    drawn: int = 500
    levels: int = 18
    windows: int = 256


SIZES: dict[Scale, Sizes] = {
    "tiny": Sizes(),
    "small": Sizes(images=10_000, drawn=2000, windows=1024),
    "paper": Sizes(images=10_000, drawn=50_000, levels=50, windows=4096),
}
AT_ONCE = 500  # images drawn together


def figures(
    config: RunConfig,
    blocks: DiffusionBlocks,
    *,
    guidance: float,
    judge: Callable[[], Judge],
    sizes: Sizes,
) -> Row:
    """What a run is worth: on data that it has not seen, and the images it draws beside real ones.

    Args:
        config:    of the run
        blocks:    trained, in evaluation mode
        guidance:  of a generator
        judge:     of images that a generator draws; is asked for where there are some
        sizes:     of the evaluation
    """  # fmt: skip
    data = config.model.open(config.data, "test", convert=config.convert)
    if family_named(config.family).text:
        return _of_text(config, blocks, data, sizes)
    if config.family == "vit":
        return _of_classes(blocks, data, sizes)
    losses = _of_losses(blocks.evaluate(data, samples=min(sizes.images, len(data))))
    return losses | _of_images(config, blocks, guidance, judge(), sizes)


def _of_losses(found: Evaluation | TextEvaluation) -> Row:
    assert isinstance(found, Evaluation)
    return {
        "loss_of_blocks": list(found.block_losses),
        "loss_at_most_noise": found.loss_at_most_noise,
    }


def _of_classes(blocks: DiffusionBlocks, data: Data, sizes: Sizes) -> Row:
    """How a classifier answers after each step: from z = 0, and from noise as in the paper.

    From noise an answer depends on the start, so each of several starts has an accuracy of its own
    after the last step, and the mean of their probabilities has another after each.
    """
    count = min(sizes.images, len(data))
    zero = blocks.evaluate(data, samples=count)
    noise = blocks.evaluate(data, samples=count, start="noise", starts=sizes.starts)
    assert isinstance(zero, Evaluation) and isinstance(noise, Evaluation)
    told = ("accuracy", "cross_entropy", "calibration_error")
    return _of_losses(zero) | {
        **{name: list(zero.metrics[name]) for name in told},
        "accuracy_of_a_start": statistics.fmean(noise.starts["accuracy"]),
        "accuracy_between_starts": statistics.stdev(noise.starts["accuracy"]),
        "accuracy_of_starts": list(noise.metrics["accuracy"]),
    }


def _of_images(
    config: RunConfig, blocks: DiffusionBlocks, guidance: float, judge: Judge, sizes: Sizes
) -> Row:
    """How far images are from real ones, and how many are recognised as what was asked for.

    They are drawn twice: on levels of equal probability, as in the paper, and on as many that are
    close all the way, of which no step has to trust the estimate at the most noise far.
    """
    classes, process = config.model.num_classes, blocks.process
    asked = torch.arange(classes).repeat_interleave(-(-sizes.drawn // classes))
    paper, close = (
        _drawn(blocks, asked, process.grid(sizes.levels, spacing), config.trainer.seed, guidance)
        for spacing in ("cdf", process.close)
    )
    precision, recall = judge.precision_recall(paper)
    return {
        "frechet": judge.distance(paper),
        "precision": precision,
        "recall": recall,
        "recognised": judge.accuracy(paper, asked),
        "frechet_close": judge.distance(close),
        "recognised_close": judge.accuracy(close, asked),
    }


def _drawn(
    blocks: DiffusionBlocks, asked: Tensor, levels: Sequence[float], seed: int, guidance: float
) -> Tensor:
    """Images (N, C, H, W) of the classes that are asked for, (N,), on the host."""
    drawn = []
    for begin in range(0, len(asked), AT_ONCE):
        draw = Draw(seed, step=0, sample=begin)
        some = {"label": asked[begin : begin + AT_ONCE].to(blocks.device)}
        drawn.append(blocks.sample(some, levels, draw, guidance=guidance).cpu())
    return torch.cat(drawn)


def _of_text(config: RunConfig, blocks: DiffusionBlocks, data: Data, sizes: Sizes) -> Row:
    """Bits per character, of the bound, or exact where a network has no noise."""
    if config.objective == "conventional":
        found = blocks.evaluate_conventional(data, samples=sizes.windows)
    else:
        # a masked text has no sampler to leave out
        starts = None if blocks.text == "masked" else 0
        found = blocks.evaluate(data, starts=starts, samples=sizes.windows)
    told = {"bits": found.bits, "bits_of_blocks": list(found.blocks)}
    told |= {"bits_down_to_least": found.least, "bits_at_most_noise": found.most_noise}
    return {name: value for name, value in told.items() if value is not None}
