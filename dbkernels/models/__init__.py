"""Networks: they receive a condition, never a prior or a partition."""

from dbkernels.models.dit import DiT, DiTConfig
from dbkernels.models.family import Family
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.vit import ViT, ViTConfig

FAMILIES = {"vit": ViT, "dit": DiT}

__all__ = [
    "FAMILIES",
    "AdaLNLayer",
    "DiT",
    "DiTConfig",
    "Family",
    "LayerConfig",
    "ViT",
    "ViTConfig",
    "run_layers",
]
