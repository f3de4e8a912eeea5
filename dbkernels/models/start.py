"""Blocks that start from a network that was trained end to end.

What both have is taken over, bit for bit. What blocks have beside it begins at zero effect, so that
the whole network, run as one block, computes at the start what the trained one computes.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dbkernels.diffusion.process import NoiseOrder
from dbkernels.models.family import FamilyModule
from dbkernels.models.model_config import ModelConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Start:
    """How a family's blocks start from a network that was trained.

    All but the first are of a network that was trained without noise, where a family has such.
    """

    free: tuple[str, ...] = ("recompute",)
    """Settings of the model that may be others than the trained network's."""
    free_without_noise: tuple[str, ...] = ()
    """More of them, which such a network does not use."""
    as_blocks: Callable[[Any], ModelConfig] | None = None
    """Configuration -> that of blocks which keep what the network knows, where nobody says
    another."""
    noise_order: NoiseOrder = "first"
    """Which of its layers best meet the most noise, where nobody says another."""
    add_noise: Callable[[FamilyModule], None] | None = None
    """Sets, in place, what such a network never used, so that noise has no effect yet."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that was trained end to end."""

    where: str
    """Its file or directory, for messages."""
    family: str
    """A key of `FAMILIES`."""
    config: ModelConfig
    weights: Weights
    """As the state dict of a model of the configuration has them, on the CPU."""
    without_noise: bool = False
    """Whether it was trained by the family's conventional loss."""

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell these weights from others."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]


@torch.no_grad()
def take_over(model: FamilyModule, trained: Trained, start: Start, *, without_noise: bool) -> None:
    """Give a new model, in place, the weights of a trained network of its family.

    Args:
        model:          as its configuration makes it; a wider dtype than the network's is fine
        trained:        whose configuration differs in no more than the family allows
        start:          of the family
        without_noise:  whether the model will be trained without noise too
    Raises:
        ValueError: a setting is another, or a weight is missing, unknown, of another shape or not
            finite. The model is as it was then.
    """
    free = start.free + (start.free_without_noise if trained.without_noise else ())
    for each in fields(trained.config):
        ours, theirs = (getattr(config, each.name) for config in (model.config, trained.config))
        if each.name not in free and ours != theirs:
            raise ValueError(f"{each.name} must be {theirs} as in {trained.where}, got {ours}")
    with torch.device("meta"):
        expected = type(model)(trained.config).state_dict()
    for name in sorted({*expected, *trained.weights}):
        wanted, got = (
            tuple(of[name].shape) if name in of else None for of in (expected, trained.weights)
        )
        if wanted != got:
            told = [shape or "no such tensor" for shape in (wanted, got)]
            raise ValueError(f"{name} of {trained.where} must be {told[0]}, got {told[1]}")
        if not trained.weights[name].isfinite().all():
            raise ValueError(f"{name} of {trained.where} must be finite, got numbers that are not")
    own = model.state_dict()
    for name in own.keys() & expected.keys():
        own[name].copy_(trained.weights[name])
    if trained.without_noise and not without_noise:
        assert start.add_noise is not None
        start.add_noise(model)
