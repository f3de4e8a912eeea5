"""Bounds of a text's bits by trained blocks; `diffusion.likelihood` has their equations.

A block is asked about the levels that it serves, and about no others, so that each block's bits are
its own.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.data.images import Batch
from dbkernels.diffusion.likelihood import Curve, GaussianBound, gaussian_bound, masked_bound
from dbkernels.diffusion.masked import Masked
from dbkernels.models.family import FamilyModule
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.philox import Draw, generator
from dbkernels.training.partition import Block
from dbkernels.training.text_bits import Reading, TextEvaluation
from dbkernels.training.together import Together

TIMES = 8  # at which each window is masked for each block
# of a block's curve: at least so many levels, and no two further apart in ln sigma, over which what
# a token tells is spread with a standard deviation of about 0.6
LEAST_LEVELS = 5
APART = 0.35


def masked_bits(blocks: Together, text: Reading) -> TextEvaluation:
    """The bound of blocks that name masked tokens.

    Every window is masked at several levels of each block, whose quantiles are spread evenly over
    all windows; which window gets which depends on the seed alone.

    Args:
        blocks:  with the masked process
        text:    as it is read
    """
    every, process = list(blocks), blocks.process
    assert isinstance(process, Masked)
    levels = [
        process.level_at(block.noise, _spread(len(text), text.seed, block.index)) for block in every
    ]
    losses = [torch.zeros(level.shape, dtype=torch.float64) for level in levels]
    text.passes.total = len(text) * TIMES * len(every)
    for batch, draw in text.batches(blocks.device):
        these = slice(draw.sample, draw.sample + len(batch["token"]))
        for block, level, loss in zip(every, levels, losses, strict=True):
            model = blocks.of(block)
            for time in range(TIMES):
                named = replace(draw, step=block.index * TIMES + time)
                at = level[time, these].to(blocks.device)
                loss[time, these] = model.losses(named, at, block.layers, batch).double().cpu()
                text.passes.made(len(at))
    intervals = [block.noise for block in every]
    bound = masked_bound(
        process,
        intervals,
        [level.flatten() for level in levels],
        [loss.flatten() for loss in losses],
        text.data.vocabulary,
    )
    each = tuple(text.unit * nats for nats in bound.blocks)
    return TextEvaluation(text.unit * bound.nats, each, len(text), text.tokens)


def _spread(windows: int, seed: int, block: int) -> Tensor:
    """Evenly spaced quantiles, (TIMES, windows) float64, in an order that chance has made."""
    count = TIMES * windows
    order = torch.randperm(count, generator=generator("cpu", seed, block))
    return ((order.double() + 0.5) / count).view(TIMES, windows)


def gaussian_bits(blocks: Together, text: Reading) -> TextEvaluation:
    """The bound of blocks that denoise embeddings, for every level at which it may stop.

    The bits are the mean of two halves of the windows, of which each stops at the level that is
    best for the other: the least of many figures with noise in them would be too low.

    Arguments are those of `masked_bits`.
    """
    levels = levels_of(blocks)
    sums, norm = _sums(blocks, text, levels)
    windows = torch.tensor([len(text) - len(text) // 2, len(text) // 2], dtype=torch.float64)

    def bound_of(halves: list[int]) -> tuple[list[Curve], GaussianBound]:
        tokens = windows[halves].sum() * text.data.length
        means = [each[halves].sum(0) / tokens for each in sums]
        curves = [Curve(at, *mean.T.tolist()) for at, mean in zip(levels, means, strict=True)]
        return curves, gaussian_bound(curves, squared_norm=norm / text.tokens)

    (curves, bound), unit = bound_of([0, 1]), text.unit
    best = bound.best[1]
    if len(text) > 1:
        (_, even), (_, odd) = bound_of([0]), bound_of([1])
        stops = torch.tensor(
            [even.nats[np.argmin(odd.nats)], odd.nats[np.argmin(even.nats)]], dtype=torch.float64
        )
        best = float((windows * stops).sum() / len(text))
    return TextEvaluation(
        unit * best,
        tuple(unit * nats for nats in bound.blocks),
        len(text),
        text.tokens,
        stop=bound.best[0],
        least=unit * bound.down_to_least,
        most_noise=unit * bound.at_most_noise,
        curves=tuple(curves),
    )


def _sums(blocks: Together, text: Reading, levels: list[list[float]]) -> tuple[list[Tensor], float]:
    """Of each block the sums over the tokens of every second window, from the first and from the
    second, of the error and the cross-entropy at its levels, (2, levels, 2) float64; and that of
    the clean rows' squared norms."""
    sums, norm = [torch.zeros(2, len(each), 2, dtype=torch.float64) for each in levels], 0.0
    for batch, draw in text.batches(blocks.device):
        step, odd = 0, draw.sample % 2
        for block, each, total in zip(blocks, levels, sums, strict=True):
            model = blocks.of(block)
            target = model.target(batch)
            for place, level in enumerate(each):
                # noise of its own for each level, so that the integral averages over it
                logits = _answer(model, block, target, level, batch, replace(draw, step=step))
                found = _error_and_entropy(model, logits, target, batch["token"])
                total[:, place] += torch.stack([found[odd::2].sum(0), found[1 - odd :: 2].sum(0)])
                step += 1
                text.passes.made(len(target))
        norm += float(target.square().sum(dtype=torch.float64))
    return sums, norm


def levels_of(blocks: Together) -> list[list[float]]:
    """Levels at which `gaussian_bits` asks each block about every window."""
    return [curve_levels(block.noise.high, block.noise.low) for block in blocks]


def curve_levels(high: float, low: float) -> list[float]:
    """Levels of a block's curve: its ends, and others between them at equal ratios."""
    count = max(LEAST_LEVELS, 1 + math.ceil(math.log(high / low) / APART))
    return [high, *np.geomspace(high, low, count)[1:-1].tolist(), low]


def _answer(
    model: FamilyModule, block: Block, target: Tensor, level: float, batch: Batch, draw: Draw
) -> Tensor:
    q = torch.full((len(target),), level, dtype=torch.float32, device=target.device)
    z = add_noise(target, torch.ones_like(q), q, draw)
    levels = torch.full_like(q[:1], level).expand(model.level_shape(batch)).contiguous()
    return model.denoise(z, levels, block.layers, batch)


def _error_and_entropy(
    model: FamilyModule, logits: Tensor, target: Tensor, token: Tensor
) -> Tensor:
    """Sums over the tokens of each window, (B, 2) float64 on the host."""
    error = (
        (target.float() - model.estimate(logits).float()).square().sum((1, 2), dtype=torch.float64)
    )
    entropy = F.cross_entropy(logits.float().flatten(0, -2), token.flatten(), reduction="none")
    return torch.stack([error, entropy.view(token.shape).sum(1, dtype=torch.float64)], dim=1).cpu()


def conventional_bits(blocks: Together, text: Reading) -> TextEvaluation:
    """Exact bits of a network without noise, which is one block of all layers.

    Arguments are those of `masked_bits`.
    """
    (block,), nats = blocks, 0.0
    text.passes.total = len(text)
    for batch, draw in text.batches(blocks.device):
        losses = blocks.of(block).conventional_losses(draw, block.layers, batch)
        nats += float(losses.sum(dtype=torch.float64))
        text.passes.made(len(losses))
    bits = text.unit * nats / len(text)
    return TextEvaluation(bits, (bits,), len(text), text.tokens)
