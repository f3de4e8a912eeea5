"""Where the CUDA caching allocator puts storages, and how much it takes from the driver for them.

The rules of c10/cuda/CUDACachingAllocator.cpp with its defaults, for one stream: sizes are rounded
up to a multiple of MIN_BLOCK and served from the smallest free block that holds them. Where there
is none, a segment is taken from the driver: SMALL_SEGMENT for a small request, LARGE_SEGMENT for a
middling one, else the request itself rounded up to ROUND_LARGE. A block that is much too large is
split; neighbours that are free are merged. Segments are never given back.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dbkernels.memory.trace import Event

MiB = 2**20
MIN_BLOCK = 512
SMALL = MiB  # largest small request; also what a larger one may waste without a split
SMALL_SEGMENT = 2 * MiB
LARGE_SEGMENT = 20 * MiB
OWN_SEGMENT = 10 * MiB  # a request from here on has a segment of its own
ROUND_LARGE = 2 * MiB


@dataclass
class Block:
    """Part of a segment, in the list of all of its parts."""

    address: int
    size: int  # bytes, a multiple of MIN_BLOCK
    small: bool  # of the pool of small blocks
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """One device with one stream. Addresses are counted from 0, segment after segment."""

    def __init__(self) -> None:
        self.segments: list[Block] = []  # first block of each
        self.reserved_bytes = 0
        # free blocks by pool, as (size, address), so that the first that fits is the best
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes, size > 0."""
        size = _round_up(size, MIN_BLOCK)
        small = size <= SMALL
        free = self._free[small]
        place = bisect.bisect_left(free, (size, 0))
        if place < len(free):
            block = self._blocks[free.pop(place)[1]]
            block.free = False
        else:
            block = self._segment(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            self._split(block, size)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; free neighbours become one block with it."""
        before, after = block.before, block.after
        if after and after.free:
            self._forget(after)
            block.size, block.after = block.size + after.size, after.after
            if after.after:
                after.after.before = block
        if before and before.free:
            self._forget(before)
            before.size, before.after = before.size + block.size, block.after
            if block.after:
                block.after.before = before
            del self._blocks[block.address]
            block = before
            self._blocks[block.address] = block
        block.free = True
        bisect.insort(self._free[block.small], (block.size, block.address))

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            taken = SMALL_SEGMENT
        else:
            taken = LARGE_SEGMENT if size < OWN_SEGMENT else _round_up(size, ROUND_LARGE)
        block = self._blocks[self.reserved_bytes] = Block(self.reserved_bytes, taken, small)
        self.segments.append(block)
        self.reserved_bytes += taken
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, True, block, block.after)
        if block.after:
            block.after.before = rest
        block.size, block.after = size, rest
        self._blocks[rest.address] = rest
        bisect.insort(self._free[rest.small], (rest.size, rest.address))

    def _forget(self, block: Block) -> None:
        self._free[block.small].remove((block.size, block.address))
        del self._blocks[block.address]


@dataclass(frozen=True)
class Placement:
    """What a caching allocator makes of events.

    Args:
        events:       of the blocks, with their bytes in place of those that were asked for
        addresses:    of each event's block
        segments:     address and bytes of each, in the order in which they were taken
    """

    events: list[Event]
    addresses: list[int]
    segments: list[tuple[int, int]]

    @property
    def reserved_bytes(self) -> int:
        """Taken from the driver; never given back, so it is also the peak."""
        return sum(size for _, size in self.segments)


def place(events: Iterable[Event]) -> Placement:
    """Run events through a caching allocator.

    A storage that changes its size moves: its new block is there before its old one is freed.
    """
    allocator, blocks, sizes = CachingAllocator(), {}, {}
    placed: list[Event] = []
    addresses: list[int] = []

    def log(event: Event, block: Block, sign: int) -> None:
        placed.append(replace(event, delta_bytes=sign * block.size))
        addresses.append(block.address)

    for event in events:
        old = blocks.pop(event.storage, None)
        size = sizes[event.storage] = sizes.get(event.storage, 0) + event.delta_bytes
        if size:
            blocks[event.storage] = allocator.allocate(size)
            log(event, blocks[event.storage], 1)
        if old:
            log(event, old, -1)
            allocator.free(old)
    starts = [block.address for block in allocator.segments]
    ends = [*starts[1:], allocator.reserved_bytes]
    # where there is no segment, the end of the last is left over
    segments = [(start, end - start) for start, end in zip(starts, ends, strict=False)]
    return Placement(placed, addresses, segments)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
