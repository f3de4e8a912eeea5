"""The tensors of one AdaLN layer, by name."""

from typing import NamedTuple

from torch import Tensor

from dbkernels.ops._norm import Modulation, NormOptions


class LayerWeights(NamedTuple):
    """What a layer learns, but for its condition's projection; F is the hidden layer's width."""

    qkv_weight: Tensor
    """(3 D, D), queries first, then keys, then values."""
    qkv_bias: Tensor | None
    """(3 D,)"""
    out_weight: Tensor
    """(D, D)"""
    out_bias: Tensor | None
    """(D,)"""
    fc1_weight: Tensor
    """(F, D); for swiglu (2 F, D), the half under silu first."""
    fc1_bias: Tensor | None
    """(F,) or (2 F,)"""
    fc2_weight: Tensor
    """(D, F)"""
    fc2_bias: Tensor | None
    """(D,)"""
    q_weight: Tensor | None = None
    """(D / H,), of the RMS norm of queries; None leaves queries and keys as they are."""
    k_weight: Tensor | None = None
    """(D / H,), of the RMS norm of keys."""

    @property
    def qk_norms(self) -> tuple[Tensor | None, Tensor | None]:
        return self.q_weight, self.k_weight


class LayerModulation(NamedTuple):
    """(samples, D) each, slices of one tensor, in the order of the published code."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor

    @property
    def between(self) -> Modulation:
        """From the attention branch to the MLP."""
        return Modulation(self.gate1, self.scale2, self.shift2)


class LayerOptions(NamedTuple):
    """What a layer is told beside its tensors."""

    num_heads: int
    mlp: str
    norm: NormOptions
    recompute: str
    num_queries: int | None = None
    """How many of the first tokens' results are wanted, fewer than there are; None wants all."""


class Activations(NamedTuple):
    """What one pass of a layer left behind; `recompute` says which of it is kept for the backward.

    N is the number of tokens whose result is wanted: T where all are.
    """

    stats1: Tensor | None
    """(samples, tokens, 2), mean and rstd of the first norm."""
    q: Tensor | None
    """(B, N, D) where N is less than T, before the norm and the rotation; else None."""
    qkv: Tensor | None
    """(B, T, 3 D), before the norm and the rotation; (B, T, 2 D) beside q."""
    attended: Tensor | None
    """(B, N, D), of the attention, before its projection out."""
    logsumexp: Tensor | None
    """(B, H, N)"""
    a: Tensor | None
    """(B, N, D), output of the attention branch."""
    stats2: Tensor | None
    """(samples, tokens, 2), of the second norm, of N tokens."""
    hidden: Tensor | None
    """(B * N, F), or 2 F for swiglu: the MLP's pre-activation without its bias."""
    m: Tensor | None
    """(B, N, D), output of the MLP."""
