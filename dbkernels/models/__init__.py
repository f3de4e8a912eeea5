"""Networks: they receive a condition, never a prior or a partition."""

from dbkernels.models.adapter import add_adapters, merge_adapters, remove_adapters
from dbkernels.models.ar import AR, ARConfig
from dbkernels.models.cross_layer import CrossConfig, CrossLayer
from dbkernels.models.dit import DiT, DiTConfig
from dbkernels.models.family import Family
from dbkernels.models.huginn import Huginn, HuginnConfig
from dbkernels.models.joint_layer import JointConfig, JointLayer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.mdm import MDM, MDMConfig
from dbkernels.models.mmdit import MMDiT, MMDiTConfig
from dbkernels.models.own_layers import OwnLayers
from dbkernels.models.parallel_layer import ParallelConfig, ParallelLayer
from dbkernels.models.registry import FAMILIES, FamilyEntry, family_named, family_of
from dbkernels.models.tensor_parallel import Cut, cut_layer, cuts
from dbkernels.models.vit import ViT, ViTConfig

__all__ = [
    "AR",
    "FAMILIES",
    "MDM",
    "ARConfig",
    "AdaLNLayer",
    "CrossConfig",
    "CrossLayer",
    "Cut",
    "DiT",
    "DiTConfig",
    "Family",
    "FamilyEntry",
    "Huginn",
    "HuginnConfig",
    "JointConfig",
    "JointLayer",
    "LayerConfig",
    "MDMConfig",
    "MMDiT",
    "MMDiTConfig",
    "OwnLayers",
    "ParallelConfig",
    "ParallelLayer",
    "ViT",
    "ViTConfig",
    "add_adapters",
    "cut_layer",
    "cuts",
    "family_named",
    "family_of",
    "merge_adapters",
    "remove_adapters",
    "run_layers",
]
