"""Tiny models of every family, with weights that hide nothing: new gates and heads are zero."""

from functools import partial

import pytest
import torch
from torch import nn

from dbkernels.diffusion.process import Interval
from dbkernels.models import FAMILIES, DiTConfig, ViTConfig
from dbkernels.ops import Draw, add_noise

# no two sizes of a family agree: 4 patches in 5 classes and 9 in 4, of 12 numbers
COMMON = {"patch": 2, "channels": 3, "dim": 8, "depth": 3, "num_heads": 2, "sigma_data": 0.7}
CONFIGS = {
    "vit": ViTConfig(image_size=4, num_classes=5, mlp_hidden=10, cond_dim=6, **COMMON),
    "dit": DiTConfig(image_size=6, num_classes=4, mlp_ratio=3, **COMMON),
}
LEVEL = torch.tensor([0.05, 0.9, 40.0])
INTERVAL = Interval(0.01, 80.0)
SCALE = torch.tensor([2.0, 0.25, 1.5])
DRAW = Draw(seed=2, step=5)
every_family = pytest.mark.parametrize("family", CONFIGS)


def randomise(module, std=0.3):
    """Fill every parameter with normal numbers, norms and biases too; the module itself."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def make_model(family):
    return randomise(FAMILIES[family].model(CONFIGS[family]))


def make_batch(model):
    """The same three samples every time."""
    random, config = torch.Generator().manual_seed(7), model.config
    image = torch.randn(3, config.channels, *2 * [config.image_size], generator=random)
    return {"image": image, "label": torch.tensor([3, 0, 2])}


def noisy(model, batch):
    """The target with the noise of the draw at each sample's level."""
    return add_noise(model.target(batch), torch.ones_like(LEVEL), LEVEL, DRAW)


def dynamo_alone(monkeypatch):
    """Let torch.compile find and check graphs as ever, and run them op by op: no kernel is made."""
    trace = partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda function, *, options, **how: trace(function, **how)
    )
