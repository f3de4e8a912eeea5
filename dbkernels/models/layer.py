"""The AdaLN transformer layer that all families share.

    shift, scale, gate (twice) = chunk6(W silu(c) + b)
    x = x + gate1 * attention((1 + scale1) * norm(x) + shift1)
    x = x + gate2 * mlp      ((1 + scale2) * norm(x) + shift2)

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero: W and b start at zero, so a new
layer returns its input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.models.attention import Attention


@dataclass(frozen=True)
class LayerConfig:
    """One AdaLN layer."""

    D: int
    """Width of the residual stream."""
    H: int
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


class AdaLNLayer(nn.Module):
    """Attention and MLP, each between a conditioned norm and a conditioned gate.

    Raises:
        ValueError: D is not a multiple of H, or norm or mlp is unknown.
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        D = config.D
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention = Attention(D, config.H, qk_norm=config.qk_norm, bias=config.bias)
        self.mlp = make_mlp(config)
        self.modulation = nn.Linear(config.cond_dim, 6 * D)
        initialise_linear(self.modulation, nn.init.zeros_)

    def initialise(self, initialise_weight: Callable[[Tensor], object]) -> None:
        """Initialise the weights of the attention's and the MLP's projections; biases become 0."""
        for part in (self.attention, self.mlp):
            for linear in part.modules():
                if isinstance(linear, nn.Linear):
                    initialise_linear(linear, initialise_weight)

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x:       (B, T, D)         residual stream
            c:       (B, cond_dim)     condition of each sample, or (B, T, cond_dim) of each token
            rotary:  (2, T, D/H)       of `rotary_table`, or None for no rotary positions
        Returns:
            (B, T, D), dtype of x.
        """
        modulation = self.modulation(F.silu(c))
        if modulation.dim() == 2:
            modulation = modulation[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = self.attention((1 + scale1) * self.norm1(x) + shift1, rotary)
        x = x + gate1 * h
        h = self.mlp((1 + scale2) * self.norm2(x) + shift2)
        return x + gate2 * h


def initialise_linear(linear: nn.Linear, initialise_weight: Callable[[Tensor], object]) -> None:
    """Initialise one projection; its bias, where it has one, becomes 0."""
    initialise_weight(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def make_norm(config: LayerConfig) -> nn.Module:
    """The norm that a layer's config asks for, over its width."""
    norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    if config.norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, got {config.norm}")
    return norms[config.norm](config.D, eps=config.eps, elementwise_affine=config.affine)


class GeluMLP(nn.Module):
    """Linear, GELU in its tanh form, Linear."""

    def __init__(self, D: int, hidden: int, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(D, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLUMLP(nn.Module):
    """fc2(silu(a) * b), where fc1 gives a and b in this order (arXiv:2002.05202)."""

    def __init__(self, D: int, hidden: int, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(D, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(a) * b)


def make_mlp(config: LayerConfig) -> nn.Module:
    """The MLP that a layer's config asks for."""
    mlps = {"gelu": GeluMLP, "swiglu": SwiGLUMLP}
    if config.mlp not in mlps:
        raise ValueError(f"mlp must be one of {', '.join(mlps)}, got {config.mlp}")
    return mlps[config.mlp](config.D, config.mlp_hidden, config.bias)
