"""One op of a layer with its inputs, and who runs it, forward and backward apart.

Shapes, and the bytes that an op must move, are those of the kernel report.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels import ops
from dbkernels.models.compiled import compiled
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference

# the report's files stand beside each other and are no package
sys.path.append(str(Path(__file__).parents[1] / "tools"))
from kernel_cases import CASES, DTYPE, HEAD_DIM, B, T
from kernel_compile import PROCESSORS, bytes_moved, record

INPUTS = {  # of the op, with which the arguments of its forward kernel begin
    "adaln_norm": 3,
    "gated_adaln_norm": 5,
    "gated_residual": 3,
    "gelu": 2,
    "swiglu": 2,
    "qk_norm_rotary": 4,
}
FOR_A_LAYER = {  # what a layer asks of a kernel's backward, and the op alone does not
    "adaln_norm": {"dres_ptr", "y_ptr"},
    "gated_adaln_norm": {"y_ptr"},
    "gelu": {"u_ptr"},
    "swiglu": {"u_ptr"},
}
DTYPES = {"cpu": torch.float32, "cuda": DTYPE}  # as a device is trained on
H100 = 90  # 10 times the compute capability; how many programs share a sum depends on it


class OpCase(NamedTuple):
    """One op at one width."""

    op: str
    D: int
    impls: tuple[str, ...]
    device: torch.device

    directions = ("fwd", "bwd")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.device.type]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the residual stream that the op works on, or beside."""
        return B, T, self.D

    def inputs(self) -> list[Tensor]:
        """Of unit variance, with the shapes and strides of the report's."""
        random = torch.Generator().manual_seed(0)
        arguments = CASES[f"{self.op}_fwd"].arguments(self.D)[: INPUTS[self.op]]
        return [
            _filled(_of_dtype(like, self.dtype), random, self.device).requires_grad_()
            if like.dtype == DTYPE
            # the table of angles alone has another dtype, and no gradient
            else rotary_table(torch.arange(T), HEAD_DIM).to(self.device)
            for like in arguments
        ]

    def function(self, impl: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        if impl == "fused":
            return _on_tensors(getattr(ops, self.op), self.D)
        eager = _on_tensors(getattr(reference, self.op), self.D)
        # a backward that is timed alone runs often on one forward
        return compiled(eager, {"donated_buffer": False}) if impl == "compiled" else eager

    def calls(self, inputs: list[Tensor]) -> dict[tuple[str, str], Callable[[], object]]:
        """By implementation and direction; a backward's begins after a forward that is done here.

        All have the same incoming gradients.
        """
        calls, leaves = {}, [tensor for tensor in inputs if tensor.requires_grad]
        for impl in self.impls:
            forward, random = partial(self.function(impl), *inputs), torch.Generator()
            outs = _as_tuple(forward())
            douts = [_filled(out, random.manual_seed(1), self.device) for out in outs]
            backward = partial(torch.autograd.grad, outs, leaves, douts, retain_graph=True)
            calls |= {(impl, "fwd"): forward, (impl, "bwd"): backward}
        return calls

    def implementation(self, impl: str, direction: str) -> str:
        """What computes."""
        fused = ops.implementation(self.device, f"{self.op}_{direction}")
        return {"fused": fused, "compiled": "inductor", "eager": "torch"}[impl]

    def bytes_moved(self, direction: str) -> int:
        case = CASES[f"{self.op}_{direction}"]
        _, launch = record(case, self.D, _arch(self.device))
        left_out = FOR_A_LAYER.get(self.op, ()) if direction == "bwd" else ()
        kept = {
            name: _of_dtype(a, self.dtype) if isinstance(a, Tensor) else a
            for name, a in launch.arguments.items()
            if name not in left_out
        }
        return bytes_moved(case, replace(launch, arguments=kept))


def _on_tensors(function: Callable, D: int) -> Callable:
    """An op as a function of its tensors alone."""
    if function.__name__ != "qk_norm_rotary":
        return function

    def heads_given(qkv, q_weight, k_weight, rotary):
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return function(qkv, D // HEAD_DIM, **weights, rotary=rotary)

    return heads_given


def _of_dtype(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the report's in the dtype of a case, its strides as they are."""
    if like.dtype != DTYPE:
        return like
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")


def _filled(like: Tensor, random: torch.Generator, device: torch.device) -> Tensor:
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return tensor.copy_(torch.randn(like.shape, generator=random))


def _as_tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outs,) if isinstance(outs, Tensor) else outs


def _arch(device: torch.device) -> int:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor in PROCESSORS:
            return 10 * major + minor
    return H100
