"""Small runs for tests marked gpu, of heads that a GPU has kernels for."""

import torch
from training.tiny import make_data

from dbkernels.models import DiT, DiTConfig, ViT, ViTConfig
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

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
    blocks = DiffusionBlocks(model, sharing=sharing)
    if settings.get("offload", "none") == "none":
        blocks = blocks.to(device)
    return Trainer(blocks, make_data(), steps=6, batch_size=4, ema=0.9, device=device, **settings)
