"""Small runs for tests marked gpu, of heads that a GPU has kernels for."""

from functools import partial

import torch
from training.tiny import PRIOR, make_data

from dbkernels.models import DiT, DiTConfig, ViT, ViTConfig
from dbkernels.training.objective import gaussian_step
from dbkernels.training.partition import partition
from dbkernels.training.sharing import BlockModels
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

DIT = DiTConfig(dim=64, depth=3, num_heads=2, image_size=4, channels=1, num_classes=3)
VIT = ViTConfig(
    image_size=4, patch=2, channels=1, num_classes=3, dim=64, depth=3, num_heads=2, mlp_hidden=256,
    cond_dim=32,
)  # fmt: skip
IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}
ASIDE = {"offload": "cpu", "steps_per_swap": 3}


def make_trainer(device, family="dit", sharing="joint", **settings):
    """Always of the same weights, to train on a device."""
    torch.manual_seed(1)
    model = DiT(DIT) if family == "dit" else ViT(VIT)
    models = BlockModels(model, partition(3, 3, PRIOR), sharing)
    config = TrainerConfig(steps=6, batch_size=4, ema=0.9, sharing=sharing, **settings)
    if config.offload == "none":
        models = models.to(device)
    weighting = "edm" if family == "dit" else "none"
    step = partial(gaussian_step, prior=PRIOR, weighting=weighting, sigma_data=0.5)
    return Trainer(models, make_data(), step, config, device=device)
