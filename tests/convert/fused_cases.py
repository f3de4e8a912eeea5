"""Modules of each class that `fuse` knows, with random weights, and arguments for them."""

from typing import NamedTuple

import torch
from convert import published
from convert.published import COND, Block, D
from convert.variations import VARIATIONS
from models.tiny import randomise
from torch import Tensor, nn

B, T = 3, 5


class Case(NamedTuple):
    module: nn.Module
    given: tuple[object, ...]
    """Arguments of a call; of tensors of floats a gradient is wanted."""


def rows(*shape: int) -> Tensor:
    """Whose mean is far from zero."""
    return torch.randn(shape) + 1


def dit_block(*names: str) -> Case:
    block = Block()
    for name in names:
        VARIATIONS[name][0](block)
    return Case(randomise(block), (rows(B, T, D), rows(B, COND)))


def one_condition_for_all() -> Case:
    return Case(randomise(published.Block()), (rows(B, T, D), rows(1, COND)))


CASES = {
    "DiTBlock": dit_block,
    "DiTBlock, one c for all": one_condition_for_all,
    "DiTBlock, affine rms, qk-norm": lambda: dit_block(
        "affine rms norms", "rms of q and k, other eps"
    ),
    "DiTBlock, affine, exact GELU": lambda: dit_block("affine norms", "exact gelu"),
    "DiTBlock, SwiGLU": lambda: dit_block("gated", "no bias of qkv", "eps of one norm"),
    "DiTBlock, wide heads": lambda: dit_block("wide heads", "no bias of fc2"),
    "DiTBlock, functions": lambda: dit_block("functions"),
}


class Network(nn.Module):
    """A model that somebody else wrote: an embedding, layers and a head."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.blocks = nn.ModuleList(layers)

    def forward(self, x, *given):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, *given)
        return self.head(x)
