"""The condition of a layer: whom it is for, and what a projection makes of it."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dbkernels.models.low_rank import as_linear
from dbkernels.ops import reference
from dbkernels.ops.backend import checks
from dbkernels.ops.layer.condition import Condition


def condition_of_all(x: Tensor, c: Tensor, D: int, width: int) -> Tensor:
    """c for all samples of x, (B, cond_dim) or (B, T, cond_dim).

    Raises:
        ValueError: x is not (B, T, D), or c is neither, nor has a B or T of 1.
    """
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


def modulation_or_condition(projection: nn.Module, c: Tensor) -> Tensor | Condition:
    """The modulation that a projection gives of silu of c; of each token, for the op to make."""
    if c.dim() == 2:
        return projection(F.silu(c))
    own = dict(projection.named_parameters(remove_duplicate=False))

    def modulate(c: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(own, parameters, strict=True))
        return functional_call(projection, given, (F.silu(c),))

    return Condition(c, modulate, tuple(own.values()))


def stock_projection(projection: nn.Module, c: Tensor) -> Tensor:
    """A projection of silu of c, which keeps a rounded copy of its weight as plain torch does."""
    return reference.projected(F.silu(c), as_linear(projection))
