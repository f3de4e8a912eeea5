"""Tiny runs for tests: seconds are spent on what a test asks, not on a model."""

import torch

from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models import DiT, DiTConfig, ViT, ViTConfig
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

PRIOR = LogNormal()
DIT = DiTConfig(dim=16, depth=3, num_heads=2, image_size=4, channels=1, num_classes=3)
VIT = ViTConfig(
    image_size=4,
    patch=2,
    channels=1,
    num_classes=3,
    dim=16,
    depth=3,
    num_heads=2,
    mlp_hidden=32,
    cond_dim=8,
)


def make_data(count=10):
    random = torch.Generator().manual_seed(5)
    images = torch.randn(count, 1, 4, 4, generator=random).numpy()
    return ImageData(images, torch.arange(count) % 3, 3)


def make_blocks(family="vit", num_blocks=3, sharing="joint", **settings):
    torch.manual_seed(1)
    model = ViT(VIT) if family == "vit" else DiT(DIT)
    return DiffusionBlocks(model, num_blocks, sharing=sharing, **settings)


def make_trainer(
    family="vit",
    num_blocks=3,
    sharing="joint",
    objective=None,
    frozen=None,
    **config,
):
    """A trainer at its first step; parameters with `frozen` in their names are not trained."""
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, **config}
    blocks = make_blocks(family, num_blocks, sharing)
    for name, parameter in blocks.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return Trainer(blocks, make_data(), objective=objective, **settings)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.blocks.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
