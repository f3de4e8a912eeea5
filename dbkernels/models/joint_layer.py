"""The layer of two residual streams with one attention over both: MM-DiT's.

    shift, scale, gate (twice, of each stream) = chunk6(W silu(c) + b)
    x       = x       + gate1 * attention of both,    then + gate2 * mlp
    context = context + gate1 * attention of both,    then + gate2 * mlp

Esser et al. 2024 (arXiv:2403.03206), section 4; each stream has weights of its own. adaLN-Zero: W
and b start at zero, so a new layer returns its inputs. The modules here hold weights;
`dbkernels.ops.joint_layer` runs.
"""

from collections.abc import Callable, Iterator
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
    initialise_branches,
    initialise_linear,
)
from dbkernels.models.condition import stock_projection
from dbkernels.models.layer import KINDS, LayerConfig, Projection
from dbkernels.models.low_rank import adapters_of_all
from dbkernels.ops import reference_layers
from dbkernels.ops.backend import checks
from dbkernels.ops.layer.joint import joint_layer
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.weights import LayerWeights


@dataclass(frozen=True)
class JointConfig(OfBranches):
    """One layer of two streams of one width."""

    dim: int
    """Width of both residual streams."""
    num_heads: int
    """Number of heads."""
    mlp_hidden: int
    """Width of each MLP's hidden layer."""
    cond_dim: int
    """Width of the condition c."""
    norm: Literal["layer", "rms"] = "layer"
    """Layer norm or RMS norm."""
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """As that of `LayerConfig`, of both streams."""
    qk_norm: bool = False
    """RMS norm of queries and keys per head, with weights of its own for each stream."""
    bias: bool | tuple[str, ...] = True
    """Whether the projections have one; or which of them, as that of `LayerConfig`."""
    eps: float = 1e-6
    """Of the norms, in units of x**2."""
    qk_eps: float = 1e-6
    """Of the norms of queries and keys, in units of their squares."""
    head_dim: int | None = None
    """Width of a head; None is dim / num_heads."""
    context_pre_only: bool = False
    """Whether the context is only keys and values, as in the last layer of SD3."""
    dual_attention: bool = False
    """Whether x has a second attention, with itself, as in the first layers of SD3.5 medium."""
    recompute: Recompute = "none"
    """What the backward computes again rather than keep: a key of `dbkernels.ops.POLICIES`."""

    def of_op(self) -> dict[str, object]:
        """The settings of `dbkernels.ops.joint_layer`, and of its specification, by name."""
        names = ("num_heads", "head_dim", "mlp", "norm", "eps", "qk_eps")
        return {name: getattr(self, name) for name in names}

    def of_stream(self) -> LayerConfig:
        """What the parts of one stream are made by."""
        names = ("dim", "num_heads", "mlp_hidden", "cond_dim", "mlp", "qk_norm", "bias", "qk_eps")
        own = {name: getattr(self, name) for name in names}
        return LayerConfig(**own, head_dim=self.head_dim)


class Stream(nn.Module):
    """Weights of one stream: its modulation, its part of the attention, and its MLP."""

    def __init__(self, config: LayerConfig, parts: int):
        super().__init__()
        self.attention, self.mlp = Attention(config), MLP(config)
        self.modulation = _modulation(config, parts)

    def weights(self, ranks: Ranks | None) -> LayerWeights:
        """For the op."""
        return _weights(self.attention, self.mlp, ranks)


class Keys(nn.Module):
    """Weights of a stream that is only keys and values.

    The attention's projection has the rows of the queries too, as in the published code, which
    computes and drops them: their gradient is zero.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = Attention(config)
        del self.attention.out
        self.modulation = _modulation(config, 2)

    def weights(self, ranks: Ranks | None) -> LayerWeights:
        """For the op."""
        return _weights(self.attention, None, ranks)


class JointLayer(nn.Module):
    """One attention over the tokens of x and of a context, and an MLP for each.

    Hooks of the layer run, and so do hooks of its parameters; the modules inside are never called.
    What `torch.export` makes of it is in torch's own ops and keeps what plain torch keeps.

    The names of its state dict do not change: x and context, each with modulation, attention.qkv,
    attention.out, mlp.fc1 and mlp.fc2, each of these with weight and bias, and what the
    configuration adds: attention.q_norm and attention.k_norm with weight, and second, an attention.
    A context of keys and values alone has no attention.out and no mlp.

    Raises:
        ValueError: dim is not a multiple of num_heads and head_dim is not given, or norm, mlp,
            recompute or the name of a bias is unknown.
    """

    def __init__(self, config: JointConfig):
        super().__init__()
        config.check_branches()
        checks.check_norm(config.norm)
        self.config, own = config, config.of_stream()
        self.x = Stream(own, 9 if config.dual_attention else 6)
        self.context = Keys(own) if config.context_pre_only else Stream(own, 6)
        self.second = Attention(own) if config.dual_attention else None
        self.note_inside()
        # (layer, x, context, c, rotary) -> (x, context) in the op's place
        self.run: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        self.ranks: Ranks | None = None  # that share the layer: of `cut_layer`

    def note_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        names = ("x", "context", *(["second"] if self.second is not None else []))
        called = ("x.modulation", "context.modulation")
        self._made = as_made(self, names, {**KINDS, Stream: (), Keys: ()}, called)

    def check_inside(self) -> None:
        """As that of `AdaLNLayer`."""
        check_as_made(self, self._made)

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attentions' and the MLPs' projections; biases become 0."""
        initialise_branches(self._branches(), initialise_weight)

    def forward(
        self, x: Tensor, context: Tensor, c: Tensor, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            x:        (B, S, D)       residual stream
            context:  (B, T, D)       the other one, such as a text
            c:        (B, cond_dim)   condition of each sample; a B of 1 stands for all
            rotary:   (2, T + S, d)   of `rotary_table`, of the context's tokens first, or None for
                      no rotary positions
        Returns:
            x (B, S, D) and the context (B, T, D), None where it is only keys and values.
        Raises:
            ValueError: a shape, dtype or device disagrees.
            RuntimeError: a module inside is not as it was made, or the gradient is differentiated.
        """
        self.check_inside()
        c = self._condition(x, context, c)
        if self.run is not None:
            return self.run(self, x, context, c, rotary)
        silu = F.silu(c)
        projected = self.x.modulation(silu), self.context.modulation(silu)
        if torch.compiler.is_exporting():
            return self.specified(x, context, *projected, rotary)
        return joint_layer(
            x,
            context,
            *projected,
            self.x.weights(self.ranks),
            self.context.weights(self.ranks),
            second_weights=self._second_weights(),
            rotary=rotary,
            recompute=self.config.recompute,
            **self.config.of_op(),
        )

    def specified(
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        context_modulation: Tensor,
        rotary: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the op's specification makes of the streams and the projections, in plain torch."""
        weights = self.x.weights(self.ranks), self.context.weights(self.ranks)
        given = modulation, context_modulation, *weights
        told = {"second_weights": self._second_weights(), "rotary": rotary}
        return reference_layers.joint_layer(x, context, *given, **told, **self.config.of_op())

    def _branches(self) -> Iterator[nn.Module]:
        for stream in (self.x, self.context):
            yield from (module for name, module in stream.named_children() if name != "modulation")
        if self.second is not None:
            yield self.second

    def stock(
        self, x: Tensor, context: Tensor, c: Tensor, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The whole layer in plain torch, as `forward` asks for it."""
        of_x, of_context = (
            stock_projection(stream.modulation, c) for stream in (self.x, self.context)
        )
        return self.specified(x, context, of_x, of_context, rotary)

    def _second_weights(self) -> LayerWeights | None:
        return None if self.second is None else _weights(self.second, None, self.ranks)

    def _condition(self, x: Tensor, context: Tensor, c: Tensor) -> Tensor:
        """c for all samples, (B, cond_dim); x, the context and c are checked."""
        D, width = self.config.dim, self.config.cond_dim
        checks.check_floats(x=x, context=context, c=c)
        for name, tokens, t in (("x", "S", x), ("context", "T", context)):
            if t.dim() != 3 or t.shape[-1] != D:
                raise ValueError(
                    f"{name} must be (B, {tokens}, D) with D = {D}, got {tuple(t.shape)}"
                )
        B = x.shape[0]  # a compiler takes len() for a constant
        if c.dim() != 2 or c.shape[0] not in (1, B) or c.shape[-1] != width:
            raise ValueError(
                f"c must be (B, cond_dim) = ({B}, {width}) or have a B of 1, got {tuple(c.shape)}"
            )
        return c if c.shape[0] == B else c.expand(B, width)


def _modulation(config: LayerConfig, parts: int) -> Projection:
    """That starts at zero."""
    projection = Projection(config.cond_dim, parts * config.dim)
    initialise_linear(projection, nn.init.zeros_)
    return projection


def _weights(attention: Attention, mlp: MLP | None, ranks: Ranks | None) -> LayerWeights:
    """Of an attention, and of an MLP where there is one; None for what is not there."""
    projections = attention.qkv, getattr(attention, "out", None), *_of_mlp(mlp)
    parameters = [getattr(each, kind, None) for each in projections for kind in ("weight", "bias")]
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    norms = [getattr(norm, "weight", None) for norm in norms]
    return LayerWeights(*parameters, *norms, ranks=ranks, adapters=adapters_of_all(projections))


def _of_mlp(mlp: MLP | None) -> tuple[nn.Module | None, nn.Module | None]:
    return (None, None) if mlp is None else (mlp.fc1, mlp.fc2)
