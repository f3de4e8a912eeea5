"""The AdaLN transformer layer that all families share.

    shift, scale, gate (twice) = chunk6(W silu(c) + b)    or of silu of that
    x = x + gate1 * attention((1 + scale1) * norm(x) + shift1)
    x = x + gate2 * mlp      ((1 + scale2) * norm(x) + shift2)

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero: W and b start at zero, so a new
layer returns its input. The modules here hold weights; `dbkernels.ops.adaln_layer` runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dbkernels.models.as_made import as_made, check_as_made
from dbkernels.models.branches import (
    MLP,
    Attention,
    OfBranches,
    branch_weights,
    initialise_branches,
    initialise_linear,
)
from dbkernels.models.condition import condition_of_all, stock_projection
from dbkernels.models.low_rank import LowRank, adapters_of, as_linear
from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import fold_affine
from dbkernels.ops.dropout import check_share
from dbkernels.ops.layer.attend import check_attention, wanted_of
from dbkernels.ops.layer.condition import Condition
from dbkernels.ops.layer.function import adaln_layer
from dbkernels.ops.layer.projection import linear
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.ops.layer.tensors import AttentionKind, ResidualStream
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice


@dataclass(frozen=True)
class LayerConfig(OfBranches):
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
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """gelu is Linear, GELU in its tanh form, Linear; gelu_exact has GELU as it is; swiglu gates one
    half with silu of the other."""
    qk_norm: bool = False
    """RMS norm of queries and keys per head."""
    bias: bool | tuple[str, ...] = True
    """Whether the attention's and the MLP's projections have one; or which of them, by the names in
    BIASED."""
    eps: float = 1e-6
    """Of the norms, in units of x**2."""
    recompute: Recompute = "none"
    """What the backward computes again rather than keep: a key of `dbkernels.ops.POLICIES`."""
    eps2: float | None = None
    """Of the norm before the MLP, where it has another; None is eps."""
    qk_eps: float = 1e-6
    """Of the norms of queries and keys, in units of their squares."""
    head_dim: int | None = None
    """Width of a head; None is dim / num_heads."""
    silu_modulation: bool = False
    """Whether silu follows the modulation's projection too, as in the code of arXiv:2506.14202."""
    dropout: float = 0.0
    """Share of each branch's output that is left out in training, where a draw is given."""
    attention_dropout: float = 0.0
    """Share of the attention's weights that is left out, likewise."""

    def of_op(self) -> dict[str, object]:
        """The settings of `dbkernels.ops.adaln_layer`, and of its specification, by name."""
        names = ("num_heads", "head_dim", "mlp", "norm", "eps", "eps2", "qk_eps")
        return {name: getattr(self, name) for name in names}


class AdaLNLayer(nn.Module):
    """Attention and MLP, each between a conditioned norm and a conditioned gate.

    Hooks of the layer run, and so do hooks of its parameters; the modules inside are never called.
    What `torch.export` makes of it is in torch's own ops and keeps what plain torch keeps.

    The names of its state dict do not change: modulation, attention.qkv, attention.out, mlp.fc1 and
    mlp.fc2, each with weight and bias, and what the configuration adds: norm1 and norm2 with weight
    and bias, attention.q_norm and attention.k_norm with weight. `add_adapters` adds names.

    Raises:
        ValueError: dim is not a multiple of num_heads and head_dim is not given, dropout is not in
            [0, 1), or norm, mlp, recompute or the name of a bias is unknown.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        config.check_branches()
        for name in ("dropout", "attention_dropout"):
            check_share(name, getattr(config, name))
        self.config = config
        eps2 = config.eps if config.eps2 is None else config.eps2
        self.norm1, self.norm2 = make_norm(config), make_norm(replace(config, eps=eps2))
        self.attention, self.mlp = Attention(config), MLP(config)
        self.modulation = Projection(config.cond_dim, 6 * config.dim)
        initialise_linear(self.modulation, nn.init.zeros_)
        self.note_inside()
        # (layer, x, c, rotary, draw, attention) -> out in the op's place: of `use_baseline`
        self.run: Callable[..., Tensor] | None = None
        self.ranks: Ranks | None = None  # that share the layer: of `cut_layer`

    def note_inside(self) -> None:
        """Take the modules inside for what they are now; any later change is refused."""
        self._made = as_made(self, ("norm1", "norm2", "attention", "mlp"), KINDS)

    def check_inside(self) -> None:
        """Refuse to run if they are not.

        Raises:
            RuntimeError: one of them was replaced, or something was added to it or changed in it.
        """
        check_as_made(self, self._made)

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attention's and the MLP's projections; biases become 0."""
        initialise_branches((self.attention, self.mlp), initialise_weight)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotary: Tensor | None = None,
        stream: ResidualStream | None = None,
        num_queries: int | None = None,
        draw: Draw | None = None,
        attention: AttentionKind = "full",
        num_samples: int | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x:       (B, T, D)         residual stream; for two-stream attention the noisy stream's
                     samples, then the clean one's, and B counts both
            c:       (B, cond_dim)     condition of each sample, or (B, T, cond_dim) of each token;
                     a B or T of 1 stands for all
            rotary:  (2, T, d)         of `rotary_table`, or None for no rotary positions
            stream:  of the stack that the layer stands in; see `run_layers`
            num_queries:  1 to T: the first so many tokens' results alone; None is T
            draw:    names what the configuration's dropout leaves out in training; None leaves
                     nothing out
            attention:    which tokens a token sees: "full", "causal" or "two_stream", as
                     `dbkernels.ops.adaln_layer` tells
            num_samples:  B / 2 of two streams: the noisy one's results alone; None is B
        Returns:
            (B or num_samples, T or num_queries, D), dtype of x.
        Raises:
            ValueError: a shape, dtype or device disagrees, num_queries is not from 1 to T, or it,
                num_samples or the configuration's attention_dropout is not for this attention.
            RuntimeError: a module inside is not as it was made, or the gradient is differentiated.
        """
        self.check_inside()
        c = condition_of_all(x, c, self.config.dim, self.config.cond_dim)
        check_attention(attention, self.config.attention_dropout, x.shape[0])
        wanted = wanted_of(x, attention, num_queries, num_samples)
        if self.run is not None:
            return wanted.alone(self.run(self, x, c, rotary, draw, attention))
        if torch.compiler.is_exporting():
            # of torch's own ops alone: such a program is differentiated like any other, and runs
            # where this package is not
            projected = self.modulation(F.silu(c))
            return wanted.alone(self.specified(x, projected, rotary, draw, attention))
        keeps = POLICIES[self.config.recompute].keeps_modulation or torch.compiler.is_compiling()
        kept = c.dim() == 2 or keeps
        return adaln_layer(
            x,
            self.modulated(self.modulation(F.silu(c))) if kept else self.condition(c),
            self.weights(),
            rotary=rotary,
            recompute=self.config.recompute,
            stream=stream,
            num_queries=num_queries,
            attention=attention,
            num_samples=num_samples,
            **self.config.of_op(),
            **self.dropout(draw),
        )

    def specified(
        self,
        x: Tensor,
        projected: Tensor,
        rotary: Tensor | None,
        draw: Draw | None = None,
        attention: AttentionKind = "full",
    ) -> Tensor:
        """What the op's specification makes of x and the projection (..., 6 D), in plain torch."""
        given = self.modulated(projected), self.weights()
        told = {**self.dropout(draw), "attention": attention}
        return reference.adaln_layer(x, *given, rotary=rotary, **self.config.of_op(), **told)

    def stock(
        self,
        x: Tensor,
        c: Tensor,
        rotary: Tensor | None,
        draw: Draw | None = None,
        attention: AttentionKind = "full",
    ) -> Tensor:
        """The whole layer in plain torch, as `forward` asks for it."""
        return self.specified(x, stock_projection(self.modulation, c), rotary, draw, attention)

    def dropout(self, draw: Draw | None) -> dict[str, object]:
        """What the op is told of dropout: nothing outside of training, or without a draw."""
        config = self.config
        if draw is None or not self.training or not (config.dropout or config.attention_dropout):
            return {}
        shares = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
        return {**shares, "draw": draw}

    def condition(self, c: Tensor) -> Condition:
        """The modulation of a condition of each token (B, T, cond_dim), for the op to make."""
        of_norms = dict(self._of_norms())
        own = dict(self.modulation.named_parameters(remove_duplicate=False))

        def modulate(c: Tensor, *parameters: Tensor) -> Tensor:
            norms = dict(zip(of_norms, parameters[: len(of_norms)], strict=True))
            given = dict(zip(own, parameters[len(of_norms) :], strict=True))
            return self.modulated(functional_call(self.modulation, given, (F.silu(c),)), norms)

        return Condition(c, modulate, (*of_norms.values(), *own.values()))

    def _of_norms(self) -> Iterator[tuple[str, Tensor]]:
        for name, norm in (("norm1", self.norm1), ("norm2", self.norm2)):
            for kind in ("weight", "bias"):
                parameter = getattr(norm, kind, None)
                if parameter is not None:
                    yield f"{name}.{kind}", parameter

    def modulated(self, projected: Tensor, of_norms: Mapping[str, Tensor] | None = None) -> Tensor:
        """The modulation (..., 6 D) that its projection gives, with the norms' own weights in it.

        Args:
            projected:  (..., 6 D)
            of_norms:   weights and biases of norm1 and norm2 by name; None is the layer's own
        """
        if self.config.silu_modulation:
            projected = F.silu(projected)
        if not self.config.affine:
            return projected
        given = dict(self._of_norms()) if of_norms is None else of_norms
        names = ("norm1", "norm2")
        each = ((given[f"{norm}.weight"], given.get(f"{norm}.bias")) for norm in names)
        return fold_norms(projected, *each)

    def weights(self) -> LayerWeights:
        """Of the projections, for the op."""
        return branch_weights(self.attention, self.mlp, self.ranks)


def fold_norms(modulation: Tensor, *norms: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The modulation that does the work of the norms' own weights and biases too.

    Args:
        modulation:  (..., 6 D)
        norms:       weight and bias (D,) of the first and of the second; no weight is no work
    Returns:
        (..., 6 D), float32 or wider where a norm has a weight.
    """
    if all(weight is None for weight, _ in norms):
        return modulation
    parts = list(modulation.chunk(6, dim=-1))
    for first, (weight, bias) in zip((0, 3), norms, strict=True):
        if weight is not None:
            shift, scale = parts[first : first + 2]
            parts[first + 1], parts[first] = fold_affine(scale, shift, weight, bias)
    return torch.cat(parts, dim=-1)


class Projection(nn.Linear):
    """A linear map of a condition, which keeps no copy of its weight under autocast."""

    ranks: Ranks | None = None
    """Each of which has some of its outputs: of `cut_layer`."""

    def forward(self, c: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if torch.compiler.is_exporting():
            return reference.projected(c, as_linear(self))
        return linear(c, self.weight, self.bias, adapters_of(self, "linear"), self.ranks)


def run_layers(
    layers: Sequence[nn.Module],
    x: Tensor,
    c: Tensor,
    rotary: Tensor | None = None,
    num_queries: int | None = None,
    draw: Draw | None = None,
    attention: AttentionKind = "full",
    num_samples: int | None = None,
) -> Tensor:
    """Run layers in order, keeping the residual stream once for several of them.

    Args and result as those of `AdaLNLayer.forward`; a layer may come again. num_queries and
    num_samples are of the last layer's result: all others compute every token, which the next
    attends to. Each place in the order has a draw of its own. A loss may read what stands between
    two layers, by a hook; gradients may be asked for in any order in which plain torch gives them.
    """
    if not layers:
        return wanted_of(x, attention, num_queries, num_samples).alone(x)
    stream, last = ResidualStream(), len(layers) - 1
    for place, layer in enumerate(layers):
        own = {} if draw is None else {"draw": draw.nth(place)}
        if place == last:
            own |= {"num_queries": num_queries, "num_samples": num_samples}
        x = layer(x, c, rotary, stream, attention=attention, **own)
    return x


def make_norm(config: LayerConfig) -> nn.Module:
    """The norm that a layer's config asks for, over its width."""
    norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    check_choice("norm", config.norm, norms)
    return norms[config.norm](config.dim, eps=config.eps, elementwise_affine=config.affine)


NORM = ("normalized_shape", "eps", "elementwise_affine")
# what is known of the modules inside a layer: their settings, by name. One of another kind, or with
# a setting that the op is not told, would stand there and do nothing
KINDS = {
    Attention: (), MLP: (), nn.Linear: (), nn.LayerNorm: NORM, nn.RMSNorm: NORM,
    nn.ModuleDict: (), LowRank: ("alpha", "start"),
}  # fmt: skip
