"""What a layer keeps for its backward: a ladder from most memory to most arithmetic.

A unit is D elements per token in the dtype of the branches. Counts are for a residual stream of
that dtype and a hidden layer of 4 D; logsumexp and the statistics of two norms add H + 4 float32
numbers per token where they are kept, and a condition of each token adds its modulation, 6 D.
Tokens whose result is not asked for count x, k and v alone.

On a CPU all rungs give the same bits but for the last, which differs where the stream is wider than
the branches, as in autocast: it keeps x as the branches have it, and its backward runs the layer on
that. What the norms make of x is rounded to that dtype in any case. On a GPU rungs that keep no
`hidden` take GELU of what bfloat16 has not rounded yet, and sum gradients in other parts.
"""

from dataclasses import dataclass
from typing import Literal

from dbkernels.ops._layer_tensors import Activations

Keep = Literal["none", "attention", "mlp", "qkv", "layer", "rounded"]


@dataclass(frozen=True)
class Rung:
    """One choice of what is kept."""

    keeps: frozenset[str]
    """Names of `Activations`; the layer's input x is always kept."""
    units: int
    """D elements per token."""
    recomputes: str
    """What the backward computes again, beside norms, modulation and activation."""
    rounds: bool = False
    """Whether x is kept in the dtype of the branches where that is narrower."""


_ALL = frozenset(Activations._fields)

RUNGS: dict[Keep, Rung] = {
    "none": Rung(_ALL, 11, "nothing"),
    "attention": Rung(_ALL - {"attended", "logsumexp"}, 10, "the attention"),
    "mlp": Rung(_ALL - {"hidden"}, 7, "fc1"),
    "qkv": Rung(_ALL - {"hidden", "q", "qkv"}, 4, "fc1 and the projection to q, k and v"),
    "layer": Rung(frozenset(), 1, "everything"),
    "rounded": Rung(frozenset(), 1, "everything, from x as the branches have it", rounds=True),
}


def rungs_of(*, mixed: bool) -> tuple[Keep, ...]:
    """The rungs that differ, from most memory to least.

    Args:
        mixed:  whether the stream is wider than the branches, as in autocast
    """
    return tuple(keep for keep, rung in RUNGS.items() if mixed or not rung.rounds)
