"""An AdaLN layer with attention to another sequence, such as a text, between its two branches.

    shift, scale, gate (twice) = chunk6(W silu(c) + b)
    x = x + gate1 * attention((1 + scale1) * norm(x) + shift1)
    x = x + W_o crossattention(W_q x, W_kv context) + b_o
    x = x + gate2 * mlp((1 + scale2) * norm(x) + shift2)

Chen et al. 2023 (arXiv:2310.00426), section 2.3, PixArt-alpha. W and b, and W_o and b_o, start at
zero, so a new layer returns its input. The modules here hold weights; `dbkernels.ops.cross_layer`
runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.models.as_made import as_made, check_as_made
from dbkernels.models.branches import BIASED as OF_BRANCHES
from dbkernels.models.branches import (
    MLP,
    Attention,
    OfBranches,
    branch_weights,
    initialise_branches,
    initialise_linear,
)
from dbkernels.models.condition import condition_of_all, modulation_or_condition
from dbkernels.models.layer import KINDS, Projection
from dbkernels.models.low_rank import adapters_of
from dbkernels.ops import reference_layers
from dbkernels.ops.backend.checks import check_norm
from dbkernels.ops.layer.cross import CHUNKS, cross_layer
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.weights import LayerWeights

BIASED = (*OF_BRANCHES, "cross_q", "cross_kv", "cross_out")


@dataclass(frozen=True)
class CrossConfig(OfBranches):
    """One layer with cross-attention."""

    dim: int
    """Width of the residual stream."""
    num_heads: int
    """Number of heads, of both attentions."""
    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the condition c."""
    context_dim: int
    """Width of the context's tokens."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm, without a weight of its own."""
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """The activation: GELU in its tanh form, GELU as it is, or one half of the hidden layer times
    silu of the other."""
    qk_norm: bool = False
    """RMS norm per head of the queries and keys of the first attention."""
    bias: bool | tuple[str, ...] = True
    """Whether the projections have one; or which of them, by the names in BIASED."""
    eps: float = 1e-6
    """Of the norms, in units of x**2."""
    recompute: Recompute = "none"
    """What the backward computes again rather than keep: a key of `dbkernels.ops.POLICIES`."""
    qk_eps: float = 1e-6
    """Of the norms of queries and keys, in units of their squares."""
    head_dim: int | None = None
    """Width of a head; None is dim / num_heads."""

    def of_op(self) -> dict[str, object]:
        """The settings of `dbkernels.ops.cross_layer`, and of its specification, by name."""
        names = ("num_heads", "head_dim", "mlp", "norm", "eps", "qk_eps")
        return {name: getattr(self, name) for name in names}


class CrossAttention(nn.Module):
    """Weights of the cross-attention; kv is one projection, in that order."""

    def __init__(self, config: CrossConfig):
        super().__init__()
        D, width = config.dim, config.attention_width
        self.q = nn.Linear(D, width, bias=config.has_bias("cross_q"))
        self.kv = nn.Linear(config.context_dim, 2 * width, bias=config.has_bias("cross_kv"))
        self.out = nn.Linear(width, D, bias=config.has_bias("cross_out"))


class CrossLayer(nn.Module):
    """Attention, cross-attention and MLP; the first and the last between a norm and a gate.

    Hooks of the layer run, and so do hooks of its parameters; the modules inside are never called.
    What `torch.export` makes of it is in torch's own ops and keeps what plain torch keeps.

    The names of its state dict are those of `AdaLNLayer`, and cross.q, cross.kv and cross.out.

    Raises:
        ValueError: dim is not a multiple of num_heads and head_dim is not given, or norm, mlp,
            recompute or the name of a bias is unknown.
    """

    def __init__(self, config: CrossConfig):
        super().__init__()
        config.check_branches(BIASED)
        check_norm(config.norm)
        self.config = config
        self.attention, self.cross, self.mlp = (
            Attention(config),
            CrossAttention(config),
            MLP(config),
        )
        self.modulation = Projection(config.cond_dim, CHUNKS * config.dim)
        for closed in (self.modulation, self.cross.out):
            initialise_linear(closed, nn.init.zeros_)
        self.note_inside()
        # (layer, x, c, context, lengths, rotary) -> out in the op's place
        self.run: Callable[..., Tensor] | None = None
        self.ranks: Ranks | None = None  # that share the layer: of `cut_layer`

    def note_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        names, kinds = ("attention", "cross", "mlp"), KINDS | {CrossAttention: ()}
        self._made = as_made(self, names, kinds)

    def check_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        check_as_made(self, self._made)

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attentions' and the MLP's projections; biases become 0, and
        so does the projection out of the cross-attention, which has no gate."""
        initialise_branches((self.attention, self.cross, self.mlp), initialise_weight)
        initialise_linear(self.cross.out, nn.init.zeros_)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x:        (B, T, D)         residual stream
            c:        (B, cond_dim)     condition of each sample, or (B, T, cond_dim) of each token;
                      a B or T of 1 stands for all
            context:  (B, S, context_dim)  the other sequence
            lengths:  (B,)              integers: how many of its tokens each sample attends to; 0
                      is nothing, None is all
            rotary:   (2, T, d)         of `rotary_table`, for the attention among x; None does not
                      rotate
        Returns:
            (B, T, D), dtype of x.
        Raises:
            ValueError: a shape, dtype or device disagrees, or a length is not from 0 to S.
            RuntimeError: a module inside is not as it was made, or the gradient is differentiated.
        """
        self.check_inside()
        c = condition_of_all(x, c, self.config.dim, self.config.cond_dim)
        if self.run is not None:
            return self.run(self, x, c, context, lengths, rotary)
        if torch.compiler.is_exporting():
            # of torch's own ops alone, as `AdaLNLayer` does
            return self.specified(x, self.modulation(F.silu(c)), context, lengths, rotary)
        return cross_layer(
            x,
            modulation_or_condition(self.modulation, c),
            context,
            self.weights(),
            lengths=lengths,
            rotary=rotary,
            recompute=self.config.recompute,
            **self.config.of_op(),
        )

    def specified(
        self,
        x: Tensor,
        projected: Tensor,
        context: Tensor,
        lengths: Tensor | None,
        rotary: Tensor | None,
    ) -> Tensor:
        """What the op's specification makes of x and the projection (..., 6 D), in plain torch."""
        given = x, projected, context, self.weights()
        told = {"lengths": lengths, "rotary": rotary, **self.config.of_op()}
        return reference_layers.cross_layer(*given, **told)

    def weights(self) -> LayerWeights:
        """Of the projections, for the op."""
        cross = {
            f"cross_{name}_{kind}": getattr(module, kind)
            for name, module in self.cross.named_children()
            for kind in ("weight", "bias")
        }
        weights = branch_weights(self.attention, self.mlp, self.ranks)
        adapters = [
            adapter
            for name, module in self.cross.named_children()
            for adapter in adapters_of(module, f"cross_{name}")
        ]
        return weights._replace(**cross, adapters=(*weights.adapters, *adapters))
