"""Tiny runs for tests: seconds are spent on what a test asks, not on a model."""

from functools import partial

import torch

from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models import DiT, DiTConfig, ViT, ViTConfig
from dbkernels.training.objective import gaussian_step
from dbkernels.training.partition import partition
from dbkernels.training.sharing import BlockModels
from dbkernels.training.trainer import Trainer, TrainerConfig

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


def make_models(family="vit", num_blocks=3, sharing="joint"):
    torch.manual_seed(1)
    model = ViT(VIT) if family == "vit" else DiT(DIT)
    return BlockModels(model, partition(3, num_blocks, PRIOR), sharing)


def make_trainer(
    family="vit", num_blocks=3, sharing="joint", objective=None, frozen=None, **config
):
    """A trainer at its first step; parameters with `frozen` in their names are not trained."""
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "sharing": sharing, **config}
    weighting = "none" if family == "vit" else "edm"
    step = partial(gaussian_step, prior=PRIOR, weighting=weighting, sigma_data=0.5)
    models = make_models(family, num_blocks, sharing)
    for name, parameter in models.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return Trainer(models, make_data(), objective or step, TrainerConfig(**settings))


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.models.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
