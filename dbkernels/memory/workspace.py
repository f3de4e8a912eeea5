"""What ops allocate inside themselves, where no dispatcher looks, by the GPU that they run on.

cuBLAS: one workspace to a handle, kept for good; a step has two handles, one to the thread of the
forward and one to that of the backward. PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp chooses
the size by compute capability: 32 MiB from Hopper on, before it 8 MiB and 128 KiB. cublasLt, for
matmuls with a bias, had one of its own of 1 MiB beside each; builds that share the two have less.

Flash attention's backward (Dao et al. 2022, arXiv:2205.14135; csrc/flash_attn/flash_api.cpp): the
gradient of the queries in float32, heads rounded up to a multiple of 32 elements (of 64 from 128
on) and tokens to one of 128, and the row sums of dout * out in float32.

The memory-efficient kernel's backward in float32 (aten's transformers/cuda/attention_backward.cu):
the product dout * out and its row sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

_aten = torch.ops.aten

MiB = 2**20
HANDLES = 2  # one to the forward's thread, one to the backward's
FLOAT32 = 4  # bytes
CUBLASLT = MiB


@dataclass(frozen=True)
class Target:
    """A device whose memory is predicted.

    Args:
        name:        as the command line has it
        processors:  streaming multiprocessors; 0 for a CPU
        cublas:      bytes of one cuBLAS workspace
    """

    name: str
    processors: int = 0
    cublas: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether it has the caching allocator and the workspaces of CUDA."""
        return self.processors > 0

    @property
    def resident(self) -> list[tuple[str, int]]:
        """Workspaces that are there through the whole step: category and bytes of each."""
        sizes = (self.cublas, CUBLASLT) * HANDLES if self.is_gpu else ()
        return [("workspaces", size) for size in sizes]

    def workspace(self, func: OpOverload, args: tuple, kwargs: dict) -> int:
        """Bytes that one call of an op allocates inside itself and frees again."""
        formula = _FORMULAS.get(func) if self.is_gpu else None
        return 0 if formula is None else formula(*args, **kwargs)


def _flash_backward(dout: Tensor, q: Tensor, *_: object, **__: object) -> int:
    B, H, T, d = q.shape
    tokens = math.ceil(T / 128) * 128
    multiple = 32 if d <= 128 else 64
    width = math.ceil(d / multiple) * multiple
    return FLOAT32 * B * H * tokens * (width + 1)


def _efficient_backward(dout: Tensor, q: Tensor, *_: object, **__: object) -> int:
    B, H, T, d = q.shape
    return FLOAT32 * B * H * T * (d + 1)


def _backward_of_either(dout: Tensor, q: Tensor, *_: object, **__: object) -> int:
    """On a CPU one op stands for the two that a GPU has, by dtype."""
    return (_efficient_backward if q.dtype == torch.float32 else _flash_backward)(dout, q)


_FORMULAS: dict[OpOverload, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _backward_of_either,
}

TARGETS = {
    target.name: target
    for target in (
        Target("cpu"),
        Target("a100", processors=108, cublas=2 * 4 * MiB + 128 * 2**10),
        Target("h100", processors=132, cublas=32 * MiB),
        Target("h200", processors=132, cublas=32 * MiB),
        Target("b200", processors=148, cublas=32 * MiB),
    )
}


def target_named(name: str) -> Target:
    """A target of the table.

    Raises:
        ValueError: the table has no such name.
    """
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name}")
    return TARGETS[name]


def target_of(device: torch.device) -> Target:
    """The device of this machine as a target."""
    if device.type == "cpu":
        return TARGETS["cpu"]
    properties = torch.cuda.get_device_properties(device)
    like = TARGETS["h100" if properties.major >= 9 else "a100"]
    return Target(properties.name, properties.multi_processor_count, like.cublas)
