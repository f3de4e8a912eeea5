"""Train deep residual transformers one block at a time."""

from dbkernels.data.images import open_data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.measure import measure_peak
from dbkernels.models import AdaLNLayer, DiT, LayerConfig, ViT
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block, block_at, partition
from dbkernels.training.trainer import Trainer, TrainerConfig

__all__ = [
    "AdaLNLayer",
    "Block",
    "DiT",
    "DiffusionBlocks",
    "Draw",
    "LayerConfig",
    "LogNormal",
    "Trainer",
    "TrainerConfig",
    "ViT",
    "block_at",
    "measure_peak",
    "open_data",
    "partition",
]
