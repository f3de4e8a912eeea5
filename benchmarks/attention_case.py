"""Attention of two streams with its inputs, and who runs it.

Eager torch computes softmax over a mask. The bytes are of tensors that the attention must read or
write once, whoever runs it. Their rate is no ceiling: where tokens are many, matmuls take the time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from op_case import (
    DTYPES,
    HEAD_DIM,
    B,
    OpCase,
    T,
    by_implementation_and_direction,
    filled,
    what_runs,
)
from torch import Tensor

from dbkernels import ops
from dbkernels.models.compiled import compiled
from dbkernels.ops import reference

ATTENTIONS = ("two_stream_attention",)
TENSORS = {"fwd": 4, "bwd": 8}  # q, k, v and the result; these, its gradient and those of q, k, v


class AttentionCase(NamedTuple):
    """The op at one width: half of the samples are of the noisy stream."""

    op: str
    dim: int
    impls: tuple[str, ...]
    device: torch.device

    directions = OpCase.directions

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.device.type]

    @property
    def dtype_name(self) -> str:
        """As a row has it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the residual stream beside which it works."""
        return B, T, self.dim

    def inputs(self) -> list[Tensor]:
        """q, k and v of unit variance, slices of one projection."""
        random = torch.Generator(self.device).manual_seed(0)
        heads = self.dim // HEAD_DIM, HEAD_DIM
        like = torch.empty(B, T, 3, *heads, dtype=self.dtype, device="meta")
        # slices of a leaf would have no gradient of their own
        return [x.detach().requires_grad_() for x in filled(like, random).unbind(2)]

    def function(self, impl: str) -> Callable[..., Tensor]:
        if impl == "fused":
            return getattr(ops, self.op)
        eager = getattr(reference, self.op)
        # a backward that is timed alone runs often on one forward
        return compiled(eager, {"donated_buffer": False}) if impl == "compiled" else eager

    def calls(
        self, inputs: Sequence[list[Tensor]]
    ) -> dict[tuple[str, str], list[Callable[[], object]]]:
        """By implementation and direction, a call for each copy of the inputs."""
        return by_implementation_and_direction(self, inputs)

    def implementation(self, impl: str, direction: str) -> str:
        """What computes all but the two causal calls, which are torch's."""
        return what_runs(impl, f"two_stream_{direction}", self.device)

    def bytes_moved(self, direction: str) -> int:
        tokens, width = B * T, self.dtype.itemsize
        # the logsumexp is float32
        return TENSORS[direction] * tokens * self.dim * width + tokens * self.dim // HEAD_DIM * 4
