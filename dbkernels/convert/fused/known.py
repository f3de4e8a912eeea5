"""Which classes `fuse` knows: the first that knows a module reads it."""

from dbkernels.convert.fused.basic_transformer_block import FusedBasicTransformerBlock
from dbkernels.convert.fused.cross_transformer_block import FusedCrossTransformerBlock
from dbkernels.convert.fused.dit_block import FusedDiTBlock
from dbkernels.convert.fused.flux_single_block import FusedFluxSingleBlock
from dbkernels.convert.fused.flux_transformer_block import FusedFluxTransformerBlock
from dbkernels.convert.fused.joint_transformer_block import FusedJointTransformerBlock
from dbkernels.convert.fused.layer import FusedLayer
from dbkernels.convert.fused.lightning_dit_block import FusedLightningDiTBlock
from dbkernels.convert.fused.timm_block import FusedTimmBlock

KNOWN: tuple[type[FusedLayer], ...] = (
    FusedLightningDiTBlock,  # before DiT's, of which it has the names
    FusedDiTBlock,
    FusedTimmBlock,
    FusedBasicTransformerBlock,
    FusedJointTransformerBlock,
    FusedFluxTransformerBlock,
    FusedCrossTransformerBlock,
    FusedFluxSingleBlock,
)
