import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from dbkernels.memory.allocator import (
    TARGETS,
    CachingAllocator,
    MiB,
    place,
    target_named,
    target_of,
)
from dbkernels.memory.tracker import Event

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention_backward.default
OF_A_CPU = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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


@pytest.mark.parametrize(
    "sizes, freed, taken",
    [
        ((6, 3, 4, 2), (0, 2), 2),  # the smallest free block that fits
        ((4, 3, 4, 2), (2, 0), 0),  # of equal ones that with the lowest address
    ],
)
def test_the_best_free_block_is_taken(sizes, freed, taken):
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MiB) for size in sizes]
    for index in freed:
        allocator.free(blocks[index])
    assert allocator.allocate(4 * MiB).address == blocks[taken].address
    assert [block.address for block in blocks[2:]] == [(sizes[0] + 3) * MiB, (sizes[0] + 7) * MiB]


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
    before = allocator.reserved_bytes
    # a small segment serves two of the largest of small requests
    whole = sorted(size for size in allocator.segments.values() if size != 2 * MiB)
    whole += [MiB] * 2 * (len(allocator.segments) - len(whole))
    assert [allocator.allocate(size).size for size in whole] == whole
    assert allocator.reserved_bytes == before


# what ops allocate inside themselves


def used(func, shape, dtype=torch.bfloat16, target="h100"):
    q = torch.empty(shape, dtype=dtype, device="meta")
    return TARGETS[target].workspace(func, (q, q, q, q, q), {"scale": None})


@pytest.mark.parametrize(
    "shape, elements",
    [
        ((2, 3, 256, 72), 2 * 3 * 256 * (96 + 1)),  # heads of 72 take 96 lanes
        ((2, 3, 200, 64), 2 * 3 * 256 * (64 + 1)),  # and 200 tokens 256 rows
        ((1, 1, 128, 128), 128 * (128 + 1)),
        ((1, 1, 128, 130), 128 * (192 + 1)),
    ],
)
@pytest.mark.parametrize("func", [FLASH, OF_A_CPU])
def test_flash_attention_adds_up_the_gradient_of_queries_in_float32(func, shape, elements):
    assert used(func, shape) == 4 * elements


@pytest.mark.parametrize("func", [EFFICIENT, OF_A_CPU])
def test_float32_takes_the_memory_efficient_kernel(func):
    assert used(func, (2, 3, 200, 72), torch.float32) == 4 * 2 * 3 * 200 * (72 + 1)


def test_other_ops_and_a_cpu_use_nothing_unseen():
    assert used(aten.mm.default, (2, 3, 256, 72)) == 0
    assert used(OF_A_CPU, (2, 3, 256, 72), target="cpu") == 0
    assert TARGETS["cpu"].resident == []


def test_cublas_has_a_workspace_to_each_of_two_threads():
    for name, cublas in {"a100": 2**23 + 2**17, "h100": 32 * MiB, "b200": 32 * MiB}.items():
        sizes = [size for category, size in TARGETS[name].resident if category == "workspaces"]
        assert sum(sizes) == 2 * (cublas + MiB)


def test_a_target_is_named():
    assert target_named("h100") is TARGETS["h100"]
    with pytest.raises(ValueError, match=r"target must be one of cpu, a100, .*, got v100"):
        target_named("v100")


def test_a_device_of_this_machine_is_a_target(monkeypatch):
    assert target_of(torch.device("cpu")) is TARGETS["cpu"]
    for major, cublas in ((8, 2**23 + 2**17), (9, 32 * MiB), (12, 32 * MiB)):
        card = SimpleNamespace(name="card", major=major, multi_processor_count=77)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        target = target_of(torch.device("cuda"))
        assert (target.name, target.processors, target.cublas) == ("card", 77, cublas)
