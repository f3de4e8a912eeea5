"""The loss of one block on one batch, and how noise levels are weighted in it.

arXiv:2506.14202, equation 6: E over sigma in the block's interval of weight(sigma) * loss.
"""

from typing import Literal

from torch import Tensor

from dbkernels.diffusion.gaussian import LogNormal, sigma_at
from dbkernels.diffusion.precondition import edm_weight, mean_edm_weight
from dbkernels.models.family import Batch, Family
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.training.partition import Block

Weighting = Literal["none", "edm", "normalised", "published"]
WEIGHTINGS = ("none", "edm", "normalised", "published")


def gaussian_step(
    model: Family,
    block: Block,
    batch: Batch,
    draw: Draw,
    *,
    prior: LogNormal,
    weighting: Weighting,
    sigma_data: float,
) -> Tensor:
    """Loss of one block. Its gradient reaches that block's layers and what the blocks share.

    Args:
        model:       a family
        block:       drawn once per batch
        batch:       of B samples
        draw:        names the noise levels and the noise
        prior:       of the noise levels
        weighting:   see `weigh`
        sigma_data:  of the weight, units of z
    Returns:
        A float32 scalar.
    """
    some = next(iter(batch.values()))
    sigma = sigma_at(prior, block.trained_noise, uniforms(draw, len(some), device=some.device))
    losses = model.losses(draw, sigma, block.layers, batch)
    mean_weight = mean_edm_weight(prior, block.trained_noise, sigma_data)
    return weigh(losses, edm_weight(sigma, sigma_data), weighting, mean_weight)


def weigh(losses: Tensor, weight: Tensor, weighting: Weighting, mean_weight: float) -> Tensor:
    """Mean of the samples' losses under one of four weightings.

    Args:
        losses:       (B,) float32
        weight:       (B,) float32, the EDM weight of each sample's noise level
        weighting:    none: the plain mean. edm: mean(weight * loss), equation 6, right for squared
                      errors. normalised: the same over `mean_weight`, so that no block outweighs
                      another. published: mean(weight) * mean(loss), what the authors' code does;
                      alone of the four it depends on how a batch is cut
        mean_weight:  expected weight of the block
    Raises:
        ValueError: the weighting is unknown.
    """
    if weighting == "none":
        return losses.mean()
    if weighting == "edm":
        return (weight * losses).mean()
    if weighting == "normalised":
        return (weight * losses).mean() / mean_weight
    if weighting == "published":
        return weight.mean() * losses.mean()
    raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting}")
