import random
from types import SimpleNamespace

import pytest
import torch

from dbkernels.memory.allocator import TARGETS, CachingAllocator, MiB, place, target_of
from dbkernels.memory.tracker import Event

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention_backward.default
OF_A_CPU = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


# the allocator's documented rules


@pytest.mark.parametrize(
    "asked, given, reserved",
    [
        # sizes are rounded up to 512 bytes, and a segment suits the request
        ([1], [512], 2 * MiB),
        ([512], [512], 2 * MiB),
        ([513], [1024], 2 * MiB),
        ([MiB], [MiB], 2 * MiB),
        ([MiB + 1], [MiB + 512], 20 * MiB),
        ([10 * MiB - 512], [10 * MiB - 512], 20 * MiB),
        ([10 * MiB], [10 * MiB], 10 * MiB),
        ([10 * MiB + 1], [10 * MiB + 512], 12 * MiB),
        ([33 * MiB], [34 * MiB], 34 * MiB),
        # small requests share a segment, and not with large ones
        ([512] * 4096, [512] * 4096, 2 * MiB),
        ([512] * 4097, [512] * 4097, 4 * MiB),
        ([2 * MiB, 512], [2 * MiB, 512], 22 * MiB),
        ([2 * MiB] * 10, [2 * MiB] * 10, 20 * MiB),
        # of 20 MiB the first leaves 11, of which the second leaves 1, too little to be split off
        ([9 * MiB, 10 * MiB], [9 * MiB, 11 * MiB], 20 * MiB),
        ([9 * MiB, 10 * MiB - 512], [9 * MiB, 10 * MiB - 512], 20 * MiB),
    ],
)
def test_requests_have_blocks_and_segments(asked, given, reserved):
    placed, allocator = place(Event(i, i, size) for i, size in enumerate(asked))
    assert [event.delta_bytes for event in placed] == given
    assert allocator.reserved_bytes == reserved


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


def test_segments_are_never_given_back_and_serve_again():
    changes = ((0, 50), (0, -50), (1, 60), (2, 50))
    _, allocator = place(Event(op, i, size * MiB) for op, (i, size) in enumerate(changes))
    assert [*allocator.segments.items()] == [(0, 50 * MiB), (50 * MiB, 60 * MiB)]


def test_a_segment_serves_the_stream_that_it_was_taken_for():
    changes = ((0, 30, 0), (0, -30, 0), (1, 30, 1), (2, 30, 0), (1, -30, 0), (3, 20, 1), (4, 1, 2))
    events = [Event(i, which, n * MiB, stream=s) for i, (which, n, s) in enumerate(changes)]
    placed, allocator = place(events)
    # the second goes, to whatever stream: its block stays that of its own
    assert [event.address // MiB for event in placed] == [0, 0, 30, 0, 30, 30, 60]
    assert [event.stream for event in placed] == [0, 0, 1, 0, 1, 1, 2]
    assert allocator.segments == {0: 30 * MiB, 30 * MiB: 30 * MiB, 60 * MiB: 2 * MiB}
    assert allocator.streams == {0: 0, 30 * MiB: 1, 60 * MiB: 2}


def test_a_storage_that_grows_moves_and_one_of_no_bytes_has_no_block():
    placed, _ = place([Event(0, 0, 512), Event(0, 1, 0), Event(1, 0, 512), Event(2, 0, -1024)])
    changes = [(event.delta_bytes, event.address) for event in placed]
    assert changes == [(512, 0), (1024, 512), (-512, 0), (-1024, 512)]


# properties


def churn(seed, count=1000):
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
def test_blocks_hold_what_was_asked_for_never_overlap_and_lie_in_segments(seed):
    asked, alive = churn(seed), {}
    placed, allocator = place(asked)
    for event, given in zip(asked, placed, strict=True):
        assert given[:2] == event[:2]  # op and storage
        if event.delta_bytes < 0:
            assert alive.pop(given.address) == -given.delta_bytes
            continue
        slack = given.delta_bytes - event.delta_bytes
        assert 0 <= slack < 512 or (event.delta_bytes > MiB and slack <= MiB + 512)
        start, end = given.address, given.address + given.delta_bytes
        assert all(end <= a or a + size <= start for a, size in alive.items())
        alive[start] = given.delta_bytes
        assert any(a <= start and end <= a + size for a, size in allocator.segments.items())
    assert not alive


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


@pytest.mark.parametrize(
    "shape, dtype, target, elements",
    [
        ((2, 3, 256, 72), torch.bfloat16, "h100", 2 * 3 * 256 * (96 + 1)),  # heads: 96 lanes
        ((2, 3, 200, 64), torch.bfloat16, "h100", 2 * 3 * 256 * (64 + 1)),  # tokens: 256 rows
        ((1, 1, 128, 128), torch.bfloat16, "h100", 128 * (128 + 1)),
        ((1, 1, 128, 130), torch.bfloat16, "h100", 128 * (192 + 1)),
        # float32 takes the memory-efficient kernel
        ((2, 3, 200, 72), torch.float32, "h100", 2 * 3 * 200 * (72 + 1)),
        ((2, 3, 256, 72), torch.bfloat16, "cpu", 0),
    ],
)
def test_attention_adds_up_the_gradient_of_queries_in_float32(shape, dtype, target, elements):
    q = torch.empty(shape, dtype=dtype, device="meta")
    for func in (EFFICIENT if dtype == torch.float32 else FLASH, OF_A_CPU):
        assert TARGETS[target].workspace(func, (q,) * 5, {"scale": None}) == 4 * elements
    assert TARGETS[target].workspace(aten.mm.default, (q, q), {}) == 0


@pytest.mark.parametrize(
    "name, cublas", [("a100", 2**23 + 2**17), ("h100", 32 * MiB), ("b200", 32 * MiB)]
)
def test_cublas_has_a_workspace_to_each_of_two_threads(name, cublas):
    assert sorted(TARGETS[name].resident) == [("workspaces", n) for n in [MiB] * 2 + [cublas] * 2]
    assert TARGETS["cpu"].resident == []


@pytest.mark.parametrize("major, like", [(8, "a100"), (9, "h100"), (12, "h100")])
def test_a_device_of_this_machine_is_a_target(monkeypatch, major, like):
    card = SimpleNamespace(name="card", major=major, multi_processor_count=77)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    target, known = target_of(torch.device("cuda")), TARGETS[like]
    assert (target.name, target.processors) == ("card", 77)
    assert (target.cublas, target.speeds) == (known.cublas, known.speeds)
    assert target_of(torch.device("cpu")) is TARGETS["cpu"]
