"""One layer with its inputs, and who runs it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.models.baseline import by_method
from dbkernels.ops import (
    LayerWeights,
    adaln_layer,
    implementation,
    joint_layer,
    parallel_layer,
    reference,
    reference_layers,
)
from dbkernels.ops.layer.recompute import policies_of

FUSED_OPS = ("adaln_norm", "gated_adaln_norm", "gated_residual", "gelu")  # of the case's layer
IMPLS = ("eager", "fused", "compiled", "compiled_budget", "checkpointed")


class Kind(NamedTuple):
    """One kind of layer."""

    op: Callable[..., object]
    specification: Callable[..., object]
    chunks: int
    """Of a stream's modulation."""
    streams: int = 1


LAYERS = {
    "adaln": Kind(adaln_layer, reference.adaln_layer, 6),
    "joint": Kind(joint_layer, reference_layers.joint_layer, 6, streams=2),
    "parallel": Kind(parallel_layer, reference_layers.parallel_layer, 3),
}


@dataclass(frozen=True)
class LayerCase:
    """A layer as DiT has it: layer norm, GELU, biases, no rotation.

    The context of a joint layer has a quarter of the tokens of x.
    """

    B: int
    T: int
    dim: int
    num_heads: int
    hidden: int
    dtype: str  # of everything; autocast is parameters and stream of float32, compute in bfloat16
    layer: str = "adaln"  # of LAYERS

    def told(self) -> dict[str, object]:
        """What a row says of it; those of an AdaLN layer do not name it."""
        return {n: v for n, v in asdict(self).items() if (n, v) != ("layer", "adaln")}

    @property
    def kind(self) -> Kind:
        return LAYERS[self.layer]

    @property
    def tokens(self) -> int:
        """Of a sample, of all streams."""
        return self.T + (max(self.T // 4, 1) if self.kind.streams == 2 else 0)

    @property
    def unit_bytes(self) -> int:
        """Of D elements per token."""
        return self.B * self.tokens * self.dim * self.compute_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of forward and backward, as three forwards; what is computed again does not count."""
        projections = 2 * self.dim * (4 * self.dim + 2 * self.hidden)
        return 3 * self.B * self.tokens * (projections + 4 * self.tokens * self.dim)

    @property
    def autocast(self) -> bool:
        return self.dtype == "autocast"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the matmuls, and of the modulation, which is a matmul's result."""
        return torch.bfloat16 if self.autocast else getattr(torch, self.dtype)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the weights and the residual stream."""
        return torch.float32 if self.autocast else self.compute_dtype


@dataclass(frozen=True)
class Competitor:
    """Who runs the layer."""

    impl: str  # of IMPLS
    recompute: str | None = None  # of POLICIES, for fused
    budget: float | None = None  # of activation memory, 1 is all; for compiled_budget

    def implementation(self, device: torch.device) -> str:
        """What computes."""
        if self.impl == "fused":
            # more than one where compiled code does not have every op of the layer
            ops = (f"{op}_{direction}" for op in FUSED_OPS for direction in ("fwd", "bwd"))
            return " + ".join(sorted({implementation(device, op) for op in ops}))
        return "inductor" if self.impl.startswith("compiled") else "torch"

    def function(self, num_heads: int, layer: str = "adaln") -> Callable[..., object]:
        """A layer of LAYERS as this one runs it."""
        if self.impl == "fused":
            return partial(LAYERS[layer].op, num_heads=num_heads, recompute=self.recompute)
        eager = partial(LAYERS[layer].specification, num_heads=num_heads)
        method = {"eager": "stock", "checkpointed": "checkpointed"}.get(self.impl, "compiled")
        return by_method(eager, method, budget=1.0 if self.budget is None else self.budget)


def competitors(
    impls: tuple[str, ...], budgets: tuple[float, ...], *, mixed: bool
) -> list[Competitor]:
    """In the order of a table, which is that of `impls`.

    Args:
        impls:    of IMPLS
        budgets:  of compiled_budget
        mixed:    whether the stream is wider than the branches, as in autocast
    """
    variants = {
        "fused": [{"recompute": recompute} for recompute in policies_of(mixed=mixed)],
        "compiled_budget": [{"budget": budget} for budget in budgets],
    }
    return [Competitor(impl, **variant) for impl in impls for variant in variants.get(impl, [{}])]


class LayerInputs(NamedTuple):
    """All but dout want a gradient."""

    x: Tensor
    modulation: Tensor
    weights: LayerWeights
    dout: Tensor
    context: "LayerInputs | None" = None
    """Of the other stream, where there is one."""

    @property
    def streams(self) -> "list[LayerInputs]":
        return [self] if self.context is None else [self, self.context]

    @property
    def given(self) -> list[Tensor | LayerWeights]:
        """The layer's arguments."""
        each = [(own.x, own.modulation, own.weights) for own in self.streams]
        return [t for of_each in zip(*each, strict=True) for t in of_each]

    @property
    def parameters(self) -> list[Tensor]:
        return [t for own in self.streams for t in own.weights.tensors() if t is not None]

    @property
    def leaves(self) -> list[Tensor]:
        streams = [t for own in self.streams for t in (own.x, own.modulation)]
        return [*streams, *self.parameters]

    @property
    def douts(self) -> list[Tensor]:
        return [own.dout for own in self.streams]


def make_inputs(case: LayerCase, device: torch.device) -> LayerInputs:
    """Drawn on the device: x of unit variance, and gates and scales away from 0."""
    random = torch.Generator(device).manual_seed(0)
    inputs = _stream(case, case.T, random)
    if case.tokens > case.T:
        inputs = inputs._replace(context=_stream(case, case.tokens - case.T, random))
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


def _stream(case: LayerCase, T: int, random: torch.Generator) -> LayerInputs:
    B, D, F, drawn = case.B, case.dim, case.hidden, {"generator": random, "device": random.device}

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return (scale * torch.randn(shape, **drawn)).to(case.parameter_dtype)

    x, dout = normal(B, T, D), normal(B, T, D)
    modulation = 0.25 + 0.75 * torch.rand(B, case.kind.chunks * D, **drawn)
    shapes = [(3 * D, D), (3 * D,), (D, D), (D,), (F, D), (F,), (D, F), (D,)]
    # a projection keeps the size of what goes in
    weights = LayerWeights(*(normal(*shape, scale=shape[-1] ** -0.5) for shape in shapes))
    return LayerInputs(x, modulation.to(case.compute_dtype), weights, dout)


class LayerStep(NamedTuple):
    """Forward plus backward of one layer, to be called."""

    layer: Callable[..., object]
    inputs: LayerInputs
    autocast: bool

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        kind = self.inputs.x.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            return self.layer(*self.inputs.given)

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs.leaves, self.inputs.douts)
