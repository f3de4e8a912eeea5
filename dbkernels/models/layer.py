"""The AdaLN transformer layer that all families share.

    shift, scale, gate (twice) = chunk6(W silu(c) + b)
    x = x + gate1 * attention((1 + scale1) * norm(x) + shift1)
    x = x + gate2 * mlp      ((1 + scale2) * norm(x) + shift2)

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero: W and b start at zero, so a new
layer returns its input. The modules here hold weights; `dbkernels.ops.adaln_layer` runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.models.as_made import as_made, check_as_made
from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import fold_affine
from dbkernels.ops.backend import checks
from dbkernels.ops.layer.function import adaln_layer
from dbkernels.ops.layer.projection import linear
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.tensors import LayerWeights, ResidualStream, first_tokens
from dbkernels.settings import check_choice


@dataclass(frozen=True)
class LayerConfig:
    """One AdaLN layer."""

    dim: int
    """Width of the residual stream."""
    num_heads: int
    """Number of heads."""
    mlp_hidden: int
    """Width of the MLP's hidden layer."""
    cond_dim: int
    """Width of the condition c."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm."""
    affine: bool = False
    """Whether the norms have a weight of their own (and a bias, for layer norm)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """gelu is Linear, GELU (tanh), Linear; swiglu gates one half with silu of the other."""
    qk_norm: bool = False
    """RMS norm of queries and keys per head."""
    bias: bool = True
    """Whether the attention's and the MLP's projections have one."""
    eps: float = 1e-6
    """Of the norms, in units of x**2."""
    recompute: Recompute = "none"
    """What the backward computes again rather than keep: a key of `dbkernels.ops.POLICIES`."""

    def of_op(self) -> dict[str, object]:
        """The settings of `dbkernels.ops.adaln_layer`, and of its specification, by name."""
        return {name: getattr(self, name) for name in ("num_heads", "mlp", "norm", "eps")}


class AdaLNLayer(nn.Module):
    """Attention and MLP, each between a conditioned norm and a conditioned gate.

    Hooks of the layer run, and so do hooks of its parameters; the modules inside are never called.
    What `torch.export` makes of it is in torch's own ops and keeps what plain torch keeps.

    The names of its state dict do not change: modulation, attention.qkv, attention.out, mlp.fc1 and
    mlp.fc2, each with weight and bias, and what the configuration adds: norm1 and norm2 with weight
    and bias, attention.q_norm and attention.k_norm with weight.

    Raises:
        ValueError: dim is not a multiple of num_heads, or norm, mlp or recompute is unknown.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        if config.dim % config.num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, got {config.dim} and {config.num_heads}"
            )
        check_choice("recompute", config.recompute, POLICIES)
        self.config = config
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention, self.mlp = Attention(config), MLP(config)
        self.modulation = Projection(config.cond_dim, 6 * config.dim)
        initialise_linear(self.modulation, nn.init.zeros_)
        self._made = as_made(self, ("norm1", "norm2", "attention", "mlp"), KINDS)
        # (layer, x, c, rotary) -> out in the op's place: of `use_baseline`
        self.run: Callable[..., Tensor] | None = None

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attention's and the MLP's projections; biases become 0."""
        for module in (*self.attention.modules(), *self.mlp.modules()):
            if isinstance(module, nn.Linear):
                initialise_linear(module, initialise_weight)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotary: Tensor | None = None,
        stream: ResidualStream | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x:       (B, T, D)         residual stream
            c:       (B, cond_dim)     condition of each sample, or (B, T, cond_dim) of each token;
                     a B or T of 1 stands for all
            rotary:  (2, T, D/H)       of `rotary_table`, or None for no rotary positions
            stream:  of the stack that the layer stands in; see `run_layers`
            num_queries:  1 to T: the first so many tokens' results alone; None is T
        Returns:
            (B, T or num_queries, D), dtype of x.
        Raises:
            ValueError: a shape, dtype or device disagrees, or num_queries is not from 1 to T.
            RuntimeError: a module inside is not as it was made, or the gradient is differentiated.
        """
        check_as_made(self, self._made)
        c = self._condition(x, c)
        if self.run is not None:
            return first_tokens(self.run(self, x, c, rotary), num_queries)
        modulation = self.modulation(F.silu(c))
        if torch.compiler.is_exporting():
            # of torch's own ops alone: such a program is differentiated like any other, and runs
            # where this package is not
            return first_tokens(self.specified(x, modulation, rotary), num_queries)
        return adaln_layer(
            x,
            self.folded(modulation),
            self.weights(),
            rotary=rotary,
            recompute=self.config.recompute,
            stream=stream,
            num_queries=num_queries,
            **self.config.of_op(),
        )

    def _condition(self, x: Tensor, c: Tensor) -> Tensor:
        """c for all samples, (B, cond_dim) or (B, T, cond_dim); x and c are checked."""
        D, width = self.config.dim, self.config.cond_dim
        checks.check_floats(x=x, c=c)
        if x.dim() != 3 or x.shape[-1] != D:
            raise ValueError(f"x must be (B, T, D) with D = {D}, got {tuple(x.shape)}")
        B, T, _ = x.shape
        fits = c.dim() in (2, 3) and c.shape[0] in (1, B) and c.shape[-1] == width
        if not fits or (c.dim() == 3 and c.shape[1] not in (1, T)):
            raise ValueError(
                f"c must be (B, cond_dim) = ({B}, {width}) or (B, T, cond_dim) = "
                f"({B}, {T}, {width}), or have a B or T of 1, got {tuple(c.shape)}"
            )
        if c.dim() == 3 and c.shape[1] == 1:
            c = c[:, 0]
        return c if c.shape[0] == B else c.expand(B, *c.shape[1:])

    def specified(self, x: Tensor, modulation: Tensor, rotary: Tensor | None) -> Tensor:
        """What the op's specification makes of x and (..., 6 D), in plain torch."""
        given = self.folded(modulation), self.weights()
        return reference.adaln_layer(x, *given, rotary=rotary, **self.config.of_op())

    def folded(self, modulation: Tensor) -> Tensor:
        """(..., 6 D), with the norms' own weights folded in."""
        if not self.config.affine:
            return modulation
        parts = list(modulation.chunk(6, dim=-1))
        for first, norm in ((0, self.norm1), (3, self.norm2)):
            shift, scale = parts[first : first + 2]
            folded = fold_affine(scale, shift, norm.weight, getattr(norm, "bias", None))
            parts[first + 1], parts[first] = folded
        return torch.cat(parts, dim=-1)

    def weights(self) -> LayerWeights:
        """Of the projections, for the op."""
        attention, mlp = self.attention, self.mlp
        projections = (attention.qkv, attention.out, mlp.fc1, mlp.fc2)
        parameters = [p for module in projections for p in (module.weight, module.bias)]
        if self.config.qk_norm:
            parameters += [attention.q_norm.weight, attention.k_norm.weight]
        return LayerWeights(*parameters)


class Projection(nn.Linear):
    """A linear map of a condition, which keeps no copy of its weight under autocast."""

    def forward(self, c: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if torch.compiler.is_exporting():
            return super().forward(c)
        return linear(c, self.weight, self.bias)


class Attention(nn.Module):
    """Weights of the attention; qkv is one projection, in that order."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        D, d = config.dim, config.dim // config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=config.bias)
        self.out = nn.Linear(D, D, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)


class MLP(nn.Module):
    """Weights of the MLP: fc2(gelu(fc1(x))) with the tanh form of GELU, or fc2(silu(a) * b), where
    fc1 gives a and b in this order (arXiv:2002.05202)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        check_choice("mlp", config.mlp, ("gelu", "swiglu"))
        first = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
        self.fc1 = nn.Linear(config.dim, first, bias=config.bias)
        self.fc2 = nn.Linear(config.mlp_hidden, config.dim, bias=config.bias)


def run_layers(
    layers: Sequence[nn.Module],
    x: Tensor,
    c: Tensor,
    rotary: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """Run layers in order, keeping the residual stream once for several of them.

    Args and result as those of `AdaLNLayer.forward`; a layer may come again. num_queries is
    of the last layer's result: all others compute every token, which the next attends to.
    A loss may read what stands between two layers, by a hook; gradients may be asked for in any
    order in which plain torch gives them.
    """
    if not layers:
        return first_tokens(x, num_queries)
    stream = ResidualStream()
    for layer in layers[:-1]:
        x = layer(x, c, rotary, stream)
    return layers[-1](x, c, rotary, stream, num_queries)


def initialise_linear(linear: nn.Linear, initialise_weight: Callable[[Tensor], object]) -> None:
    """Initialise one projection; its bias, where it has one, becomes 0."""
    initialise_weight(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def make_norm(config: LayerConfig) -> nn.Module:
    """The norm that a layer's config asks for, over its width."""
    norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    check_choice("norm", config.norm, norms)
    return norms[config.norm](config.dim, eps=config.eps, elementwise_affine=config.affine)


NORM = ("normalized_shape", "eps", "elementwise_affine")
# what is known of the modules inside a layer: their settings, by name. One of another kind, or with
# a setting that the op is not told, would stand there and do nothing
KINDS = {Attention: (), MLP: (), nn.Linear: (), nn.LayerNorm: NORM, nn.RMSNorm: NORM}
