"""The parts that layers of every kind have: an attention and an MLP, which hold weights alone."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dbkernels.models.low_rank import adapters_of_all
from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.layer.ranks import Ranks
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.settings import check_choice

BIASED = ("qkv", "out", "fc1", "fc2")  # the projections of the attention and of the MLP


class OfBranches:
    """What the configurations of layers derive from their `bias`, `head_dim` and widths."""

    dropout = attention_dropout = 0.0  # where a layer has none

    def has_bias(self, name: str) -> bool:
        """Whether the projection of a name in BIASED has one."""
        return self.bias if isinstance(self.bias, bool) else name in self.bias

    @property
    def attention_width(self) -> int:
        """Of all heads together."""
        if self.head_dim is None:
            return self.dim
        return self.num_heads * self.head_dim

    def check_branches(self, biased: tuple[str, ...] = BIASED) -> None:
        """Raises:
        ValueError: dim is not a multiple of num_heads and head_dim is not given, or recompute or
            the name of a bias is unknown.
        """
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, got {self.dim} and {self.num_heads}"
            )
        check_choice("recompute", self.recompute, POLICIES)
        for name in () if isinstance(self.bias, bool) else self.bias:
            check_choice("bias", name, biased)


class Attention(nn.Module):
    """Weights of the attention; qkv is one projection, in that order."""

    def __init__(self, config: OfBranches):
        super().__init__()
        D, width, eps = config.dim, config.attention_width, config.qk_eps
        self.qkv = nn.Linear(D, 3 * width, bias=config.has_bias("qkv"))
        self.out = nn.Linear(width, D, bias=config.has_bias("out"))
        if config.qk_norm:
            d = width // config.num_heads
            self.q_norm, self.k_norm = nn.RMSNorm(d, eps=eps), nn.RMSNorm(d, eps=eps)


class MLP(nn.Module):
    """Weights of the MLP: fc2(gelu(fc1(x))), or fc2(silu(a) * b), where fc1 gives a and b in this
    order (arXiv:2002.05202)."""

    def __init__(self, config: OfBranches):
        super().__init__()
        check_choice("mlp", config.mlp, ACTIVATIONS)
        first = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
        self.fc1 = nn.Linear(config.dim, first, bias=config.has_bias("fc1"))
        self.fc2 = nn.Linear(config.mlp_hidden, config.dim, bias=config.has_bias("fc2"))


def branch_weights(attention: Attention, mlp: MLP, ranks: Ranks | None = None) -> LayerWeights:
    """Of the projections of both, for an op; of this one of the ranks that share them."""
    projections = (attention.qkv, attention.out, mlp.fc1, mlp.fc2)
    parameters = [p for module in projections for p in (module.weight, module.bias)]
    norms = [None, None]
    if "q_norm" in attention._modules:
        norms = [attention.q_norm.weight, attention.k_norm.weight]
    return LayerWeights(*parameters, *norms, ranks=ranks, adapters=adapters_of_all(projections))


def initialise_branches(
    branches: Sequence[nn.Module], initialise_weight: Callable[[Tensor], object]
) -> None:
    """Initialise every projection in some modules."""
    for branch in branches:
        for module in branch.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module, initialise_weight)


def initialise_linear(linear: nn.Linear, initialise_weight: Callable[[Tensor], object]) -> None:
    """Initialise one projection; its bias, where it has one, becomes 0."""
    initialise_weight(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
