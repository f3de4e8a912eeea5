"""What a layer keeps for its backward: a ladder from most memory to most arithmetic.

A unit is D elements per token in the dtype of the branches. Counts are for a residual stream of
that dtype and a hidden layer of 4 D; logsumexp and the statistics of two norms add H + 4 float32
numbers per token where they are kept, and a condition of each token adds its modulation, 6 D.
"""

from dataclasses import dataclass
from typing import Literal

from dbkernels.ops._layer_tensors import Activations

Keep = Literal["none", "attention", "mlp", "qkv", "layer"]


@dataclass(frozen=True)
class Rung:
    """One choice of what is kept."""

    keeps: frozenset[str]
    """Names of `Activations`; the layer's input x is always kept."""
    units: int
    """D elements per token."""
    recomputes: str
    """What the backward computes again, beside norms, modulation and activation."""


_ALL = frozenset(Activations._fields)

RUNGS = {
    "none": Rung(_ALL, 11, "nothing"),
    "attention": Rung(_ALL - {"attended", "logsumexp"}, 10, "the attention"),
    "mlp": Rung(_ALL - {"hidden"}, 7, "fc1"),
    "qkv": Rung(_ALL - {"hidden", "qkv"}, 4, "fc1 and the projection to q, k and v"),
    "layer": Rung(frozenset(), 1, "everything"),
}
