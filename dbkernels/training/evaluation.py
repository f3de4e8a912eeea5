"""What a trained model is worth: loss per block, loss at sigma_max, accuracy after each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models.family import Batch
from dbkernels.ops.philox import Draw
from dbkernels.ops.randomness import stream_seed
from dbkernels.training.inference import classify
from dbkernels.training.partition import block_at
from dbkernels.training.pending import Staging
from dbkernels.training.sharing import BlockModels

LEVELS_PER_BLOCK = 8  # quantiles of each block's interval at which its loss is read
EVALUATION_KEY = 2**62 + 1  # keeps evaluation's streams apart from training's


def batches(
    data: ImageData, batch_size: int, device: torch.device | str, limit: int | None = None
) -> Iterator[Batch]:
    """The samples in order, each once, at most `limit` of them; the last batch may be short."""
    count = len(data) if limit is None else min(limit, len(data))
    put = Staging(device).put
    for indices in torch.arange(count).split(batch_size):
        yield data.batch(indices, put)


@torch.no_grad()
def loss_at(
    models: BlockModels, data: ImageData, level: float, *, seed: int, batch_size: int = 256
) -> float:
    """Mean loss over the data at one noise level, by the block that serves it, unweighted.

    At sigma_max z holds nothing of the target, so there the loss cannot be won by copying it.
    """
    total, count = 0.0, 0
    device = next(models.parameters()).device
    block = block_at(models.blocks, level)
    for batch in batches(data, batch_size, device):
        sigma = torch.full((len(batch["label"]),), level, device=device)
        draw = _draw(seed, count)
        losses = models.of(block).losses(draw, sigma, block.layers, batch)
        total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def block_losses(
    models: BlockModels, data: ImageData, prior: LogNormal, *, seed: int, batch_size: int = 256
) -> list[float]:
    """Mean loss of each block over the interval it serves, unweighted, at equal quantiles."""
    means = []
    for block in models.blocks:
        low, high = prior.cdf(block.noise.low), prior.cdf(block.noise.high)
        shares = (np.arange(LEVELS_PER_BLOCK) + 0.5) / LEVELS_PER_BLOCK
        levels = [prior.quantile(low + share * (high - low)) for share in shares]
        losses = [loss_at(models, data, x, seed=seed, batch_size=batch_size) for x in levels]
        means.append(sum(losses) / len(losses))
    return means


@dataclass(frozen=True)
class Classification:
    """Accuracy in [0, 1] and cross-entropy in nats after each Euler step, at descending levels."""

    levels: tuple[float, ...]
    accuracy: tuple[float, ...]
    cross_entropy: tuple[float, ...]


def evaluate_classifier(
    models: BlockModels,
    data: ImageData,
    levels: Sequence[float],
    *,
    seed: int,
    batch_size: int = 256,
) -> Classification:
    """Classify every sample, from pure noise, and read the answer after each Euler step."""
    correct, nats, count = np.zeros(len(levels)), np.zeros(len(levels)), 0
    device = next(models.parameters()).device
    for batch in batches(data, batch_size, device):
        label, draw = batch["label"], _draw(seed, count)
        logits = [each.float() for each in classify(models, batch, levels, draw)]
        correct += [int((each.argmax(-1) == label).sum()) for each in logits]
        nats += [float(F.cross_entropy(each, label, reduction="sum")) for each in logits]
        count += len(label)
    return Classification(tuple(levels), tuple(correct / count), tuple(nats / count))


def _draw(seed: int, sample: int) -> Draw:
    """The noise from one sample of the data on: the same in batches of any size."""
    return Draw(stream_seed(seed, EVALUATION_KEY), step=0, sample=sample)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Distance of two sets of features, each taken as a normal distribution.

        |m1 - m2|**2 + tr(C1 + C2 - 2 (C1 C2)**(1/2))

    Dowson & Landau 1982. Called FID only where the features are Inception's.

    Args:
        first:   (N, K)  features, N at least 2
        second:  (M, K)
    """
    a, b = (features.double().cpu().numpy() for features in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "features must be two matrices of equal width with at least 2 rows, "
            f"got {a.shape} and {b.shape}"
        )
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # the product is similar to a positive matrix: its eigenvalues are real but for rounding
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0))
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)
