"""A layer whose attention and MLP stand side by side, after one norm and before one projection.

    shift, scale, gate = chunk3(W silu(c) + b)
    y = (1 + scale) * norm(x) + shift
    x = x + gate * W_out [attention(y), activation(W_1 y + b_1)]

Dehghani et al. 2023 (arXiv:2302.05442), section 2; the condition is adaLN-Zero's
(arXiv:2212.09748), as in Flux's single-stream layers: a new layer returns its input. The modules
here hold weights; `dbkernels.ops.parallel_layer` runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.models.as_made import as_made, check_as_made
from dbkernels.models.branches import (
    MLP,
    Attention,
    OfBranches,
    branch_weights,
    initialise_branches,
    initialise_linear,
)
from dbkernels.models.condition import condition_of_all, modulation_or_condition, stock_projection
from dbkernels.models.layer import KINDS, Projection
from dbkernels.ops import reference_layers
from dbkernels.ops.backend.checks import check_norm
from dbkernels.ops.layer.parallel import CHUNKS, parallel_layer
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.weights import LayerWeights

BIASED = ("qkv", "fc1", "fc2")  # the one bias of W_out is fc2's


@dataclass(frozen=True)
class ParallelConfig(OfBranches):
    """One parallel layer."""

    dim: int
    """Width of the residual stream."""
    num_heads: int
    """Number of heads."""
    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the condition c."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm, without a weight of its own."""
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """The activation: GELU in its tanh form, GELU as it is, or one half of the hidden layer times
    silu of the other."""
    qk_norm: bool = False
    """RMS norm of queries and keys per head."""
    bias: bool | tuple[str, ...] = True
    """Whether the projections have one; or which of them, by the names in BIASED."""
    eps: float = 1e-6
    """Of the norm, in units of x**2."""
    recompute: Recompute = "none"
    """What the backward computes again rather than keep: a key of `dbkernels.ops.POLICIES`."""
    qk_eps: float = 1e-6
    """Of the norms of queries and keys, in units of their squares."""
    head_dim: int | None = None
    """Width of a head; None is dim / num_heads."""

    def of_op(self) -> dict[str, object]:
        """The settings of `dbkernels.ops.parallel_layer`, and of its specification, by name."""
        names = ("num_heads", "head_dim", "mlp", "norm", "eps", "qk_eps")
        return {name: getattr(self, name) for name in names}

    def has_bias(self, name: str) -> bool:
        """Whether the projection of a name in BIASED has one."""
        return name in BIASED and super().has_bias(name)


class ParallelLayer(nn.Module):
    """Attention and MLP side by side, between a conditioned norm and a conditioned gate.

    Hooks of the layer run, and so do hooks of its parameters; the modules inside are never called.
    What `torch.export` makes of it is in torch's own ops and keeps what plain torch keeps.

    The names of its state dict are those of `AdaLNLayer`. attention.out and mlp.fc2 are the two
    halves of W_out, with one bias, mlp.fc2's.

    Raises:
        ValueError: dim is not a multiple of num_heads and head_dim is not given, or norm, mlp,
            recompute or the name of a bias is unknown.
    """

    def __init__(self, config: ParallelConfig):
        super().__init__()
        config.check_branches(BIASED)
        check_norm(config.norm)
        self.config = config
        self.attention, self.mlp = Attention(config), MLP(config)
        self.modulation = Projection(config.cond_dim, CHUNKS * config.dim)
        initialise_linear(self.modulation, nn.init.zeros_)
        self.note_inside()
        # (layer, x, c, rotary) -> out in the op's place
        self.run: Callable[..., Tensor] | None = None
        self.ranks: Ranks | None = None  # that share the layer: of `cut_layer`

    def note_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        self._made = as_made(self, ("attention", "mlp"), KINDS)

    def check_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        check_as_made(self, self._made)

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attention's and the MLP's projections; biases become 0."""
        initialise_branches((self.attention, self.mlp), initialise_weight)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x:       (B, T, D)         residual stream
            c:       (B, cond_dim)     condition of each sample, or (B, T, cond_dim) of each token;
                     a B or T of 1 stands for all
            rotary:  (2, T, d)         of `rotary_table`, or None for no rotary positions
        Returns:
            (B, T, D), dtype of x.
        Raises:
            ValueError: a shape, dtype or device disagrees.
            RuntimeError: a module inside is not as it was made, or the gradient is differentiated.
        """
        self.check_inside()
        c = condition_of_all(x, c, self.config.dim, self.config.cond_dim)
        if self.run is not None:
            return self.run(self, x, c, rotary)
        if torch.compiler.is_exporting():
            # of torch's own ops alone, as `AdaLNLayer` does
            return self.specified(x, self.modulation(F.silu(c)), rotary)
        return parallel_layer(
            x,
            modulation_or_condition(self.modulation, c),
            self.weights(),
            rotary=rotary,
            recompute=self.config.recompute,
            **self.config.of_op(),
        )

    def specified(self, x: Tensor, projected: Tensor, rotary: Tensor | None) -> Tensor:
        """What the op's specification makes of x and the projection (..., 3 D), in plain torch."""
        given = x, projected, self.weights()
        return reference_layers.parallel_layer(*given, rotary=rotary, **self.config.of_op())

    def stock(self, x: Tensor, c: Tensor, rotary: Tensor | None) -> Tensor:
        """The whole layer in plain torch, as `forward` asks for it."""
        return self.specified(x, stock_projection(self.modulation, c), rotary)

    def weights(self) -> LayerWeights:
        """Of the projections, for the op."""
        return branch_weights(self.attention, self.mlp, self.ranks)
