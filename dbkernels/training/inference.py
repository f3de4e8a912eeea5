"""From trained blocks to predictions: each noise level is denoised by the block that serves it.

arXiv:2506.14202, section 3.3 and the published code: N levels are N evaluations of one block each.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dbkernels.diffusion.samplers import Denoiser, euler, guided, heun, start
from dbkernels.models.family import Batch
from dbkernels.ops.philox import Draw, normals
from dbkernels.training.partition import block_at
from dbkernels.training.sharing import BlockModels

Sampler = Literal["euler", "heun"]
SAMPLERS = {"euler": euler, "heun": heun}


def predict(models: BlockModels, batch: Batch, z: Tensor, level: float) -> Tensor:
    """Prediction of the block that serves a level, in the family's own form.

    Args:
        models:  the blocks' models
        batch:   what the family conditions on
        z:       (B, ...) float32
        level:   one for the whole batch; units of z
    """
    block = block_at(models.blocks, level)
    levels = torch.full((len(z),), level, device=z.device)
    return models.of(block).denoise(z, levels, block.layers, batch)


def block_denoiser(models: BlockModels, batch: Batch) -> Denoiser:
    """The denoiser that a sampler follows: at each level, the estimate of the block serving it."""

    def denoiser(z: Tensor, level: float) -> Tensor:
        model = models.of(block_at(models.blocks, level))
        return model.estimate(predict(models, batch, z, level))

    return denoiser


@torch.no_grad()
def classify(
    models: BlockModels, batch: Batch, levels: Sequence[float], draw: Draw
) -> list[Tensor]:
    """Logits after each Euler step, from pure noise down the levels.

    Args:
        models:     blocks of a classifier
        batch:      "image" (B, C, H, W); labels are not read
        levels:     descending; the last prediction is the answer
        draw:       names the start
    Returns:
        One (B, num_classes) per level.
    """
    config, logits = models.model.config, []

    def denoiser(z: Tensor, level: float) -> Tensor:
        logits.append(predict(models, batch, z, level))
        return models.of(block_at(models.blocks, level)).estimate(logits[-1])

    image = batch["image"]
    noise = normals(draw, len(image), config.dim, image.device)
    euler(denoiser, start(noise, levels[0], config.sigma_data), levels)
    return logits


@torch.no_grad()
def generate(
    models: BlockModels,
    labels: Tensor,
    levels: Sequence[float],
    draw: Draw,
    *,
    guidance: float = 1.0,
    sampler: Sampler = "euler",
) -> Tensor:
    """Draw one image per label.

    Args:
        models:     blocks of an image family
        labels:     (B,) int64
        levels:     descending
        draw:       names the start; an image depends on its own place in the draw alone
        guidance:   scale of classifier-free guidance; 1 for none
        sampler:    euler, or heun
    Returns:
        (B, C, H, W) float32, in the range of the training data.
    Raises:
        ValueError: the sampler is unknown, or a label is out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler}")
    config = models.model.config
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
        raise ValueError(
            f"labels must be 0 to {config.num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    batch = {"label": labels}
    without = models.model.unconditional(batch)
    denoiser = guided(block_denoiser(models, batch), block_denoiser(models, without), guidance)
    shape = (config.channels, config.image_size, config.image_size)
    noise = normals(draw, len(labels), math.prod(shape), labels.device).unflatten(1, shape)
    return SAMPLERS[sampler](denoiser, start(noise, levels[0], config.sigma_data), levels)
