"""Weights of other people's models."""

from dbkernels.convert.checkpoint import load, save_as
from dbkernels.convert.dit_block import (
    dit_block_from_layer,
    layer_from_dit_block,
    layer_from_dit_state,
)
from dbkernels.convert.fusion import Fusion, fuse, unfuse

__all__ = [
    "Fusion",
    "dit_block_from_layer",
    "fuse",
    "layer_from_dit_block",
    "layer_from_dit_state",
    "load",
    "save_as",
    "unfuse",
]
