import random
from collections import Counter

import pytest

from dbkernels.memory.allocator import CachingAllocator, MiB, place
from dbkernels.memory.trace import Event


def births(*sizes):
    return [Event(i, i, size) for i, size in enumerate(sizes)]


def blocks(*sizes):
    return [event.delta_bytes for event in place(births(*sizes)).events]


def reserved(*sizes):
    return place(births(*sizes)).reserved_bytes


# the allocator's documented rules


@pytest.mark.parametrize("asked, given", [(1, 512), (512, 512), (513, 1024), (MiB, MiB)])
def test_sizes_are_rounded_up_to_512_bytes(asked, given):
    assert blocks(asked) == [given]


@pytest.mark.parametrize(
    "asked, taken",
    [
        (1, 2 * MiB),
        (MiB, 2 * MiB),
        (MiB + 1, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 1, 12 * MiB),
        (33 * MiB, 34 * MiB),
    ],
)
def test_a_segment_suits_the_request(asked, taken):
    assert reserved(asked) == taken


def test_small_requests_share_a_segment_and_not_with_large_ones():
    assert reserved(*[512] * 4096) == 2 * MiB
    assert reserved(*[512] * 4097) == 4 * MiB
    assert reserved(2 * MiB, 512) == 22 * MiB
    assert reserved(*[2 * MiB] * 10) == 20 * MiB


def test_a_large_block_keeps_up_to_a_mebibyte_that_is_left_over():
    # of 20 MiB the first leaves 11, of which the second leaves 1, too little to be split off
    assert blocks(9 * MiB, 10 * MiB) == [9 * MiB, 11 * MiB]
    assert blocks(9 * MiB, 10 * MiB - 512) == [9 * MiB, 10 * MiB - 512]


def test_the_smallest_free_block_that_fits_is_taken():
    allocator = CachingAllocator()
    wide, gap, narrow, end = (allocator.allocate(size * MiB) for size in (6, 3, 4, 2))
    for block in (wide, narrow):
        allocator.free(block)
    assert allocator.allocate(4 * MiB).address == narrow.address
    assert (gap.address, end.address) == (6 * MiB, 13 * MiB)


def test_equal_blocks_are_taken_from_the_lowest_address():
    allocator = CachingAllocator()
    taken = [allocator.allocate(2 * MiB) for _ in range(5)]
    for block in (taken[2], taken[0]):
        allocator.free(block)
    assert allocator.allocate(2 * MiB).address == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_become_one_block(order):
    allocator = CachingAllocator()
    taken = [allocator.allocate(6 * MiB) for _ in range(3)]
    for index in order:
        allocator.free(taken[index])
    allocator.allocate(18 * MiB)
    # beyond OWN_SEGMENT, and yet in the 20 MiB that are there
    assert allocator.reserved_bytes == 20 * MiB


def test_segments_are_never_given_back():
    events = [Event(0, 0, 50 * MiB), Event(1, 0, -50 * MiB), Event(2, 1, 60 * MiB)]
    assert place(events).segments == [(0, 50 * MiB), (50 * MiB, 60 * MiB)]


def test_a_storage_that_grows_moves():
    placed = place([Event(0, 0, 512), Event(1, 0, 512), Event(2, 0, -1024)])
    assert [event.delta_bytes for event in placed.events] == [512, 1024, -512, -1024]
    assert placed.addresses == [0, 512, 0, 512]


def test_a_storage_of_no_bytes_has_no_block():
    placed = place([Event(0, 0, 0)])
    assert placed.events == placed.segments == [] and placed.reserved_bytes == 0


# properties


def churn(seed, count=3000):
    """Births and deaths of storages of all sizes, all dead at the end."""
    draw, alive, events = random.Random(seed), {}, []
    for index in range(count):
        if alive and draw.random() < 0.5:
            storage = draw.choice(list(alive))
            events.append(Event(index, storage, -alive.pop(storage)))
        else:
            alive[index] = int(10 ** draw.uniform(0, 8))
            events.append(Event(index, index, alive[index]))
    return [*events, *(Event(count, storage, -size) for storage, size in alive.items())]


@pytest.mark.parametrize("seed", range(3))
def test_blocks_never_overlap_and_lie_in_segments(seed):
    placed, alive = place(churn(seed)), {}
    for event, address in zip(placed.events, placed.addresses, strict=True):
        if event.delta_bytes < 0:
            assert alive.pop(address) == -event.delta_bytes
            continue
        end = address + event.delta_bytes
        assert all(end <= a or a + size <= address for a, size in alive.items())
        alive[address] = event.delta_bytes
        assert any(a <= address and end <= a + size for a, size in placed.segments)
    assert not alive


@pytest.mark.parametrize("seed", range(3))
def test_a_block_holds_what_was_asked_for_and_little_more(seed):
    events = churn(seed)
    placed = place(events)
    asked = {e.storage: e.delta_bytes for e in events if e.delta_bytes > 0}
    given = {e.storage: e.delta_bytes for e in placed.events if e.delta_bytes > 0}
    for storage, size in asked.items():
        slack = given[storage] - size
        assert 0 <= slack < 512 or (size > MiB and slack <= MiB + 512)
    assert Counter(e.op for e in events) == Counter(e.op for e in placed.events)


@pytest.mark.parametrize("seed", range(3))
def test_freed_memory_is_one_block_to_a_segment_again(seed):
    allocator, alive = CachingAllocator(), {}
    for event in churn(seed):
        if event.delta_bytes > 0:
            alive[event.storage] = allocator.allocate(event.delta_bytes)
        else:
            allocator.free(alive.pop(event.storage))
    assert all(block.free and block.after is None for block in allocator.segments)
    assert sum(block.size for block in allocator.segments) == allocator.reserved_bytes
