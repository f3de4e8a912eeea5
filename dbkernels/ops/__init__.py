"""Fused arithmetic of AdaLN layers on tensors, with its gradients."""

from dbkernels.ops.activations import gelu, gelu_exact, swiglu
from dbkernels.ops.adaln_norm import adaln_norm, fold_affine
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.attention import attention
from dbkernels.ops.backend.register import implementation, use_implementation
from dbkernels.ops.cross_attention import cross_attention
from dbkernels.ops.dropout import dropout
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm
from dbkernels.ops.gated_residual import gated_residual
from dbkernels.ops.layer.condition import Condition
from dbkernels.ops.layer.cross import cross_layer
from dbkernels.ops.layer.function import adaln_layer
from dbkernels.ops.layer.joint import joint_layer
from dbkernels.ops.layer.linear import Adapter
from dbkernels.ops.layer.parallel import parallel_layer
from dbkernels.ops.layer.projection import linear
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.stacked import Stacked
from dbkernels.ops.layer.tensors import ResidualStream
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.ops.linear_cross_entropy import linear_cross_entropy
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.ops.qk_norm_rotary import qk_norm_rotary
from dbkernels.ops.score_loss import score_loss
from dbkernels.ops.table_rows import table_rows
from dbkernels.ops.two_stream import two_stream_attention

__all__ = [
    "POLICIES",
    "Adapter",
    "Condition",
    "Draw",
    "LayerWeights",
    "Ranks",
    "ResidualStream",
    "Stacked",
    "adaln_layer",
    "adaln_norm",
    "add_noise",
    "attention",
    "cross_attention",
    "cross_layer",
    "dropout",
    "fold_affine",
    "gated_adaln_norm",
    "gated_residual",
    "gelu",
    "gelu_exact",
    "implementation",
    "joint_layer",
    "linear",
    "linear_cross_entropy",
    "normals",
    "parallel_layer",
    "qk_norm_rotary",
    "score_loss",
    "swiglu",
    "table_rows",
    "two_stream_attention",
    "uniforms",
    "use_implementation",
]
