"""Fused arithmetic of AdaLN layers on tensors, with its gradients."""

from dbkernels.ops._layer_tensors import LayerWeights
from dbkernels.ops._register import implementation, use_implementation
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.affine import fold_affine
from dbkernels.ops.attention import attention
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm
from dbkernels.ops.gated_residual import gated_residual
from dbkernels.ops.gelu import gelu
from dbkernels.ops.layer import adaln_layer
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary
from dbkernels.ops.rung import RUNGS
from dbkernels.ops.swiglu import swiglu

__all__ = [
    "RUNGS",
    "LayerWeights",
    "adaln_layer",
    "adaln_norm",
    "attention",
    "fold_affine",
    "gated_adaln_norm",
    "gated_residual",
    "gelu",
    "implementation",
    "qk_norm_rotary",
    "swiglu",
    "use_implementation",
]
