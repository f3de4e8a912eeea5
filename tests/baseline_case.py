"""A small problem for the baselines, and what their tests do with a row."""

import numpy as np
import torch
from torch import nn

from dbkernels.data.images import ImageData
from dbkernels.models.vit import ViTConfig
from dbkernels.ops.philox import Draw

VIT = ViTConfig(dim=16, depth=2, num_heads=2, mlp_hidden=32, cond_dim=8, patch=4)
DRAW = Draw(seed=5, step=3, sample=2)


def quadrants(count, seed, num_classes=3, shape=(1, 8, 8)):
    """Images of noise, of which the label tells the brightest quarter."""
    random = np.random.default_rng(seed)
    labels = random.integers(num_classes, size=count)
    images = 0.3 * random.standard_normal((count, *shape)).astype(np.float32)
    for k in range(num_classes):
        down, right = 4 * (k // 2), 4 * (k % 2)
        images[labels == k, :, down : down + 4, right : right + 4] += 1
    return ImageData(images, torch.from_numpy(labels), num_classes)


DATA = quadrants(256, seed=0)


def batch_of(data=DATA, count=6):
    return data.batch(torch.arange(count))


def loss_of(row, index=0, batch=None, draw=DRAW):
    batch = batch_of() if batch is None else batch
    return row.objective(row.blocks, row.blocks[index], batch, draw)


def shaken(row):
    """With all weights away from zero, where a new layer returns its input."""
    for name, parameter in row.blocks.named_parameters():
        random = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data.add_(0.3 * noise)
    return row


def without_dropout(row):
    for module in row.blocks.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return row
