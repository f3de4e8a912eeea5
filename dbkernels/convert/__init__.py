"""Weights of other people's models."""

from dbkernels.convert.adapter_files import load_adapters, merge_adapter_files, save_adapters
from dbkernels.convert.checkpoint import load, save_as
from dbkernels.convert.dit_block import (
    dit_block_from_layer,
    layer_from_dit_block,
    layer_from_dit_state,
)
from dbkernels.convert.fusion import Fusion, fuse, unfuse
from dbkernels.convert.source import open_trained

__all__ = [
    "Fusion",
    "dit_block_from_layer",
    "fuse",
    "layer_from_dit_block",
    "layer_from_dit_state",
    "load",
    "load_adapters",
    "merge_adapter_files",
    "open_trained",
    "save_adapters",
    "save_as",
    "unfuse",
]
