"""Which classes `fuse` knows: the first that knows a module reads it."""

from dbkernels.convert.fused.dit_block import FusedDiTBlock
from dbkernels.convert.fused.layer import FusedLayer

KNOWN: tuple[type[FusedLayer], ...] = (FusedDiTBlock,)
