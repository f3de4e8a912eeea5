"""What a layer's backward computes again: from most memory to most arithmetic.

A unit is D elements per token in the dtype of the branches. Counts are for a residual stream of
that dtype, a hidden layer of 4 D and heads as wide together as D; SwiGLU, whose hidden layer is
twice as wide, adds 4 where it is kept. logsumexp and the statistics of two norms add H + 4 float32
numbers per token where they are kept. Tokens and samples whose results are not asked for count x, k
and v alone. Other kinds of layers have counts of their own.

A condition of each token adds its modulation, 6 D, and the silu of it that its projection read,
where the modulation is kept. Else it adds nothing but the condition itself, which all layers of a
stack share; each layer then keeps its own x.

Adapters of low rank add nothing at any policy. What one could keep is x A^T, r / D of a unit, which
the backward makes again from x, or from what became x, that it has for the gradient of A anyway.

On a CPU all policies give the same bits, except the last one where the stream is wider than the
branches, as in autocast: it keeps x in the branches' dtype, and its backward runs the layer on
that. What the norms make of x is rounded to that dtype in any case. In float16, which ends at
65504, each token is divided by a power of two, for which it keeps 4 bytes; it is 1 where the token
fits. On a GPU policies without `hidden` take GELU of what bfloat16 has not rounded yet, and sum
gradients in other parts.
"""

from dataclasses import dataclass
from typing import Literal

from dbkernels.ops.layer.tensors import Activations

Recompute = Literal["none", "attention", "mlp", "qkv", "layer", "layer_narrow"]


@dataclass(frozen=True)
class Policy:
    """One choice of what a layer keeps for its backward and what it computes again."""

    keeps: frozenset[str]
    """Names of `Activations`; the layer's input x is always kept."""
    units: int
    """D elements per token of an AdaLN layer."""
    recomputes: str
    """What the backward computes again, beside norms, modulation and activation."""
    narrow: bool = False
    """Whether x is kept in the dtype of the branches where that is narrower."""

    @property
    def keeps_modulation(self) -> bool:
        """Whether the modulation of a condition of each token is kept, not computed again."""
        return "qkv" in self.keeps


_ALL, _NOTHING = frozenset(Activations._fields), frozenset[str]()
_ATTENDED = {"attended", "attended2", "cross_attended"}
_ATTENDED |= {"logsumexp", "logsumexp2", "cross_logsumexp"}
_MADE_AGAIN = {"hidden", "q", "qkv", "qkv2", "cross_q", "cross_kv"}

POLICIES: dict[Recompute, Policy] = {
    "none": Policy(_ALL, 11, "nothing"),
    "attention": Policy(_ALL - _ATTENDED, 10, "the attention"),
    "mlp": Policy(_ALL - {"hidden"}, 7, "fc1"),
    "qkv": Policy(_ALL - _MADE_AGAIN, 4, "fc1 and the projection to q, k and v"),
    "layer": Policy(_NOTHING, 1, "everything"),
    "layer_narrow": Policy(_NOTHING, 1, "everything, from x in the branches' dtype", narrow=True),
}


def policies_of(*, mixed: bool) -> tuple[Recompute, ...]:
    """The policies that differ, from most memory to least.

    Args:
        mixed:  whether the stream is wider than the branches, as in autocast
    """
    return tuple(recompute for recompute, policy in POLICIES.items() if mixed or not policy.narrow)
