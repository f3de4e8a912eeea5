"""What a device takes for a run beside the bytes of its tensors: segments, and workspaces of ops.

Segments. The rules of c10/cuda/CUDACachingAllocator.cpp with its defaults: sizes are rounded up to
a multiple of MIN_BLOCK and served from the smallest free block of the same stream that holds them.
Where there is none, a segment is taken from the driver: SMALL_SEGMENT for a small request,
LARGE_SEGMENT for a middling one, else the request itself rounded up to ROUND_LARGE. A block that is
much too large is split; neighbours that are free are merged. Segments are never given back, and
serve the stream that they were taken for.

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

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch._ops import OpOverload

from dbkernels.memory.tracker import Event

MiB = 2**20
MIN_BLOCK = 512
SMALL = MiB  # largest small request; also what a larger one may waste without a split
SMALL_SEGMENT = 2 * MiB
LARGE_SEGMENT = 20 * MiB
OWN_SEGMENT = 10 * MiB  # a request from here on has a segment of its own
ROUND_LARGE = 2 * MiB
HANDLES = 2  # one to the forward's thread, one to the backward's
FLOAT32 = 4  # bytes
CUBLASLT = MiB
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_OF_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Block(NamedTuple):
    """Part of a segment that is in use."""

    address: int
    size: int  # bytes, a multiple of MIN_BLOCK
    small: bool  # of the pool of small blocks
    stream: int = 0


class CachingAllocator:
    """One device. Addresses are counted from 0, segment after segment."""

    def __init__(self) -> None:
        self.segments: dict[int, int] = {}  # bytes of each, by its first address, in order
        self.streams: dict[int, int] = {}  # that each serves, likewise
        # end of each free block, by its address; of each stream's pool of small blocks and other
        self._free: defaultdict[tuple[int, bool], dict[int, int]] = defaultdict(dict)

    @property
    def reserved_bytes(self) -> int:
        """Taken from the driver; never given back, so it is also the peak."""
        return sum(self.segments.values())

    def allocate(self, size: int, stream: int = 0) -> Block:
        """A block of at least `size` bytes, size > 0."""
        size = _round_up(size, MIN_BLOCK)
        small = size <= SMALL
        free = self._free[stream, small]
        # the smallest that fits, and of equal ones that with the lowest address
        fitting = ((end - start, start) for start, end in free.items() if end - start >= size)
        found, start = min(fitting, default=None) or self._add_segment(size, small, stream)
        free.pop(start, None)
        if found - size >= MIN_BLOCK if small else found - size > SMALL:
            free[start + size] = start + found
            found = size
        return Block(start, found, small, stream)

    def free(self, block: Block) -> None:
        """Give a block back; free neighbours of the same segment become one block with it."""
        free = self._free[block.stream, block.small]
        start, end = block.address, block.address + block.size
        if end not in self.segments:
            end = free.pop(end, end)
        if start not in self.segments:
            start = next((other for other, until in free.items() if until == start), start)
        free[start] = end

    def _add_segment(self, size: int, small: bool, stream: int) -> tuple[int, int]:
        """Bytes and address of a new segment for a request."""
        large = LARGE_SEGMENT if size < OWN_SEGMENT else _round_up(size, ROUND_LARGE)
        start = self.reserved_bytes
        self.segments[start] = SMALL_SEGMENT if small else large
        self.streams[start] = stream
        return self.segments[start], start


def place(events: Iterable[Event]) -> tuple[list[Event], CachingAllocator]:
    """Run events through a caching allocator.

    A storage that changes its size moves: its new block is there before its old one is freed.

    Returns:
        The events of the blocks, with their addresses and with their bytes in place of those that
        were asked for, and the allocator as they leave it.
    """
    allocator, placed = CachingAllocator(), []
    sizes: Counter[int] = Counter()
    blocks: dict[int, Block] = {}
    for event in events:
        old = blocks.pop(event.storage, None)
        sizes[event.storage] += event.delta_bytes
        if size := sizes[event.storage]:
            new = blocks[event.storage] = allocator.allocate(size, event.stream)
            placed.append(event._replace(delta_bytes=new.size, address=new.address))
        if old:
            at = {"address": old.address, "stream": old.stream}
            placed.append(event._replace(delta_bytes=-old.size, **at))
            allocator.free(old)
    return placed, allocator


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Target:
    """A device whose memory and time are predicted.

    Args:
        name:        as the command line has it
        processors:  streaming multiprocessors; 0 for a CPU
        cublas:      bytes of one cuBLAS workspace
        speeds:      float32 and bfloat16 operations per second of dense matmuls without TF32, and
                     bytes per second of one direction of the link to the host, by its vendor
    """

    name: str
    processors: int = 0
    cublas: int = 0
    speeds: tuple[float, float, float] = (1e12, 1e12, 5e10)

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
        if not self.is_gpu or func not in (_FLASH, _EFFICIENT, _OF_A_CPU):
            return 0
        q = args[1]  # after the gradient of the result
        B, H, T, d = q.shape
        # on a CPU one op stands for the two that a GPU has, by dtype
        if func is _EFFICIENT or (func is _OF_A_CPU and q.dtype == torch.float32):
            return FLOAT32 * B * H * T * (d + 1)
        width = _round_up(d, 32 if d <= 128 else 64)
        return FLOAT32 * B * H * _round_up(T, 128) * (width + 1)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu"),
        Target("a100", 108, 2 * 4 * MiB + 128 * 2**10, (19.5e12, 312e12, 32e9)),
        Target("h100", 132, 32 * MiB, (67e12, 989e12, 64e9)),
        Target("h200", 132, 32 * MiB, (67e12, 989e12, 64e9)),
        Target("b200", 148, 32 * MiB, (75e12, 2250e12, 64e9)),
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
    return replace(like, name=properties.name, processors=properties.multi_processor_count)
