"""Train deep residual transformers one block at a time."""

from dbkernels.data.images import open_data
from dbkernels.diffusion.gaussian import LogNormal, cdf_grid
from dbkernels.memory.measure import measure_peak
from dbkernels.models import AdaLNLayer, DiT, LayerConfig, ViT
from dbkernels.ops.philox import Draw
from dbkernels.training.inference import classify, generate
from dbkernels.training.objective import gaussian_step
from dbkernels.training.partition import Block, block_at, partition
from dbkernels.training.sharing import BlockModels
from dbkernels.training.trainer import Trainer, TrainerConfig

__all__ = [
    "AdaLNLayer",
    "Block",
    "BlockModels",
    "DiT",
    "Draw",
    "LayerConfig",
    "LogNormal",
    "Trainer",
    "TrainerConfig",
    "ViT",
    "block_at",
    "cdf_grid",
    "classify",
    "gaussian_step",
    "generate",
    "measure_peak",
    "open_data",
    "partition",
]
