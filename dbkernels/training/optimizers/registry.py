"""The optimizers that have a name."""

from typing import Literal

from dbkernels.training.optimizers.adamw import FusedAdamW
from dbkernels.training.optimizers.kind import Kind
from dbkernels.training.optimizers.low_bit import LowBitAdamW
from dbkernels.training.optimizers.muon import MuonAndAdamW

OptimizerName = Literal["adamw", "muon", "adamw8bit", "adamw4bit"]

OPTIMIZERS: dict[OptimizerName, Kind] = {
    "adamw": FusedAdamW(),
    "muon": MuonAndAdamW(),
    "adamw8bit": LowBitAdamW(8),
    "adamw4bit": LowBitAdamW(4),
}
