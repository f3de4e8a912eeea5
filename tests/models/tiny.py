"""Tiny models of every family, with weights that hide nothing: new gates and heads are zero."""

from functools import partial

import pytest
import torch
from torch import nn

from dbkernels.diffusion.masked import MASK
from dbkernels.diffusion.process import Interval
from dbkernels.models import (
    FAMILIES,
    ARConfig,
    DiTConfig,
    HuginnConfig,
    MDMConfig,
    MMDiTConfig,
    ViTConfig,
    family_of,
)
from dbkernels.ops import Draw, add_noise

# no two sizes of a family agree: 4 patches in 5 classes and 9 in 4, of 12 numbers
COMMON = {"patch": 2, "channels": 3, "dim": 8, "depth": 3, "num_heads": 2, "sigma_data": 0.7}
TEXT = {"dim": 8, "depth": 3, "num_heads": 2, "mlp_hidden": 10, "cond_dim": 6}
TEXT |= {"length": 7, "vocabulary": 5}
CONFIGS = {
    "vit": ViTConfig(image_size=4, num_classes=5, mlp_hidden=10, cond_dim=6, **COMMON),
    "dit": DiTConfig(image_size=6, num_classes=4, mlp_ratio=3, **COMMON),
    "mmdit": MMDiTConfig(
        image_size=6, mlp_ratio=3, parallel=1, text_length=5, text_dim=7, pooled_dim=6, **COMMON
    ),
    "mdm": MDMConfig(**TEXT),
    "ar": ARConfig(**TEXT, sigma_data=0.7, next_token_weight=0.0),
    "huginn": HuginnConfig(**TEXT, prelude=1, coda=1, read_out="paper", sigma_data=0.7),
}
IMAGES = ("vit", "dit")
LEVEL = torch.tensor([0.05, 0.9, 40.0])
INTERVAL = Interval(0.01, 80.0)
SCALE = torch.tensor([2.0, 0.25, 1.5])
DRAW = Draw(seed=2, step=5)
every_family = pytest.mark.parametrize("family", CONFIGS)
image_families = pytest.mark.parametrize("family", IMAGES)


def randomise(module, std=0.3):
    """Fill every parameter with normal numbers, norms and biases too; the module itself."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def make_model(family):
    return randomise(FAMILIES[family].model(CONFIGS[family]))


def make_batch(model):
    """The same three samples every time."""
    random = torch.Generator().manual_seed(7)
    batch = {name: field.made(3, random) for name, field in model.config.fields().items()}
    return batch | ({"label": torch.tensor([3, 0, 2])} if "label" in batch else {})


def is_masked(model):
    return family_of(model).text == "masked"


def levels_of(model):
    """Three levels of the family's process, and an interval that has them."""
    if family_of(model).process_of(model.config).range.high <= 1:
        return torch.tensor([0.3, 0.9, 0.6]), Interval(0.2, 0.95)
    return LEVEL, INTERVAL


def noisy(model, batch):
    """The target with the noise of the draw at each sample's level."""
    target, (level, _) = model.target(batch), levels_of(model)
    if is_masked(model):
        return target.masked_fill(model.masked(DRAW, level, batch), MASK)
    return add_noise(target, *model.prediction.path(level), DRAW)


def dynamo_alone(monkeypatch):
    """Let torch.compile find and check graphs as ever, and run them op by op: no kernel is made."""
    trace = partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda function, *, options, **how: trace(function, **how)
    )
