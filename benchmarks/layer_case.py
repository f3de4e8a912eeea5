"""One AdaLN layer with its inputs, and who runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.models.baseline import by_method
from dbkernels.ops import LayerWeights, adaln_layer, implementation, reference
from dbkernels.ops.layer.recompute import policies_of

FUSED_OPS = ("adaln_norm", "gated_adaln_norm", "gated_residual", "gelu")  # of the case's layer
IMPLS = ("eager", "fused", "compiled", "compiled_budget", "checkpointed")


@dataclass(frozen=True)
class LayerCase:
    """A layer as DiT has it: layer norm, GELU, biases, no rotation."""

    B: int
    T: int
    dim: int
    num_heads: int
    hidden: int
    dtype: str  # of everything; autocast is parameters and stream of float32, compute in bfloat16

    @property
    def unit_bytes(self) -> int:
        """Of D elements per token."""
        return self.B * self.T * self.dim * self.compute_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of forward and backward, as three forwards; what is computed again does not count."""
        projections = 2 * self.dim * (4 * self.dim + 2 * self.hidden)
        return 3 * self.B * self.T * (projections + 4 * self.T * self.dim)

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

    def function(self, num_heads: int) -> Callable[[Tensor, Tensor, LayerWeights], Tensor]:
        if self.impl == "fused":
            return partial(adaln_layer, num_heads=num_heads, recompute=self.recompute)
        eager = partial(reference.adaln_layer, num_heads=num_heads)
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

    @property
    def parameters(self) -> list[Tensor]:
        return [weight for weight in self.weights if weight is not None]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.modulation, *self.parameters]


def make_inputs(case: LayerCase, device: torch.device) -> LayerInputs:
    """Drawn on the device: x of unit variance, and gates and scales away from 0."""
    B, T, D, F = case.B, case.T, case.dim, case.hidden
    random = torch.Generator(device).manual_seed(0)
    drawn = {"generator": random, "device": device}

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return (scale * torch.randn(shape, **drawn)).to(case.parameter_dtype)

    x, dout = normal(B, T, D), normal(B, T, D)
    modulation = (0.25 + 0.75 * torch.rand(B, 6 * D, **drawn)).to(case.compute_dtype)
    shapes = [(3 * D, D), (3 * D,), (D, D), (D,), (F, D), (F,), (D, F), (D,)]
    # a projection keeps the size of what goes in
    weights = LayerWeights(*(normal(*shape, scale=shape[-1] ** -0.5) for shape in shapes))
    inputs = LayerInputs(x, modulation, weights, dout)
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


class LayerStep(NamedTuple):
    """Forward plus backward of one layer, to be called."""

    layer: Callable[[Tensor, Tensor, LayerWeights], Tensor]
    inputs: LayerInputs
    autocast: bool

    def forward(self) -> Tensor:
        x, modulation, weights, _ = self.inputs
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.layer(x, modulation, weights)

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs.leaves, self.inputs.dout)
