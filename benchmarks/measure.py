"""How every benchmark here measures, once: milliseconds, bytes at the peak, bytes kept.

Time. Competitors are called in turn, and each round begins with the next of them, so that a clock
that falls or a neighbour that wakes up meets them all. On a GPU a call is a CUDA graph where one
can be captured, and else what the host launches. Before each, the L2 cache is filled by reading:
what is written lies there until something takes its place, and is then written back while the call
is timed. Work that is smaller than the cache is called on several copies of its inputs in one
graph, see `rotations`. On a CPU the competitors themselves push each other's data out of the
caches.

Memory. What an allocator handed out during one call, beyond what was there before it. On a GPU
that is torch's statistics. On a CPU it is the running sum of what torch's profiler saw allocated
and freed, also within ops and compiled code.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Key = TypeVar("Key")
Call = Callable[[], object]
Calls = Mapping[Key, Call | Sequence[Call]]

WARM_UP_MS = {"cpu": 100, "cuda": 100}  # of each competitor; one call at least


@dataclass(frozen=True)
class Times:
    """Of one competitor, over the rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    timing: str  # "wall clock", "cuda graph", or "cuda events", which see the host's gaps


# time


def interleaved(calls: Calls, *, device: torch.device, rounds: int) -> dict[Key, Times]:
    """Time calls against each other.

    Args:
        calls:   by any key; on a GPU with the stream of `own_stream` current, and made there. A
                 sequence is the same work on copies of its inputs: a time is that of all of them,
                 over their number. What a call has as `prepare` is called before it, untimed
        device:  that they run on
        rounds:  in each of which every call is timed once; 2 or more
    Returns:
        The times of each call, by the same keys.
    """
    return {
        key: Times(*quantiles(milliseconds), rounds, timing)
        for key, (milliseconds, timing) in samples(calls, device=device, rounds=rounds).items()
    }


def samples(
    calls: Calls, *, device: torch.device, rounds: int, capture: bool = True
) -> dict[Key, tuple[list[float], str]]:
    """Time calls against each other, and keep every time.

    Args:
        calls, device, rounds:  as those of `interleaved`
        capture:                whether a GPU's calls are tried as CUDA graphs
    Returns:
        By the same keys: milliseconds, one for each round, of the last calls that were made; and
        how they were timed, as `Times` says.
    """
    clock = _clock(device, capture)
    several = {key: [call] if callable(call) else list(call) for key, call in calls.items()}
    ready = {key: clock.ready(partial(_all_of, each)) for key, each in several.items()}
    found = {key: ([], timing) for key, (_, timing) in ready.items()}
    for number in range(rounds):
        for key in turned(list(calls), number):
            for call in several[key]:
                getattr(call, "prepare", lambda: None)()
            found[key][0].append(clock.ms(ready[key][0]) / len(several[key]))
    return found


def _all_of(calls: Sequence[Call]) -> list[object]:
    # all results are alive at once: one in another's place would be written to the cache alone
    return [call() for call in calls]


def rotations(device: torch.device, moved_bytes: int) -> int:
    """Copies of a call's inputs of which each has left the cache before its turn comes again.

    Args:
        device:       that the call runs on
        moved_bytes:  that one call reads and writes
    Returns:
        1 on a CPU; on a GPU so many that together they move twice the L2 cache or more.
    """
    if device.type != "cuda":
        return 1
    return -(-2 * _cache_bytes(device) // moved_bytes)


def copies(device: torch.device, moved_bytes: int, count: int) -> list[Call]:
    """Plain copies that each move as many bytes as one call, the ceiling of its size.

    Args:
        device:       of the memory
        moved_bytes:  read and written by one copy, of which each does half
        count:        of the copies, each between memory of its own
    """
    half = moved_bytes // 2
    targets = [torch.empty(half, dtype=torch.uint8, device=device) for _ in range(count)]
    return [partial(target.copy_, torch.ones_like(target)) for target in targets]


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def turned(keys: Sequence[Key], number: int) -> list[Key]:
    """The order of one round."""
    first = number % len(keys)
    return [*keys[first:], *keys[:first]]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the quantiles at 20 and 80 %, between samples in proportion."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[-1]


def own_stream(device: torch.device):
    """Context in which calls for `interleaved` are made and timed.

    A forward and its backward run on one stream, and the default one cannot be captured.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _clock(device: torch.device, capture: bool) -> "_CudaClock | _WallClock":
    return _CudaClock(device, capture) if device.type == "cuda" else _WallClock()


class _WallClock:
    def ready(self, call: Call) -> tuple[Call, str]:
        _warm_up(call, WARM_UP_MS["cpu"], synchronise=lambda: None)
        return call, "wall clock"

    def ms(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


class _CudaClock:
    def __init__(self, device: torch.device, capture: bool):
        self.capture = capture
        size = 2 * _cache_bytes(device) // torch.float32.itemsize
        self.evicting = torch.ones(size, device=device)
        self.sum = torch.empty((), device=device)

    def ready(self, call: Call) -> tuple[Call, str]:
        _warm_up(call, WARM_UP_MS["cuda"], synchronise=torch.cuda.synchronize)
        # the default stream refuses a capture, and a capture that fails may leave torch's generator
        # as in one: every random number after it raises
        if not self.capture or torch.cuda.current_stream() == torch.cuda.default_stream():
            return call, "cuda events"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                results = call()
            del results  # the graph keeps its memory
        # what waits for the device inside cannot be captured
        except RuntimeError:
            torch.cuda.synchronize()
            return call, "cuda events"
        graph.replay()
        return graph.replay, "cuda graph"

    def ms(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self.evicting, dim=0, out=self.sum)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def _warm_up(call: Call, ms: float, synchronise: Callable[[], None]) -> None:
    call()  # may compile, which warms nothing up
    synchronise()
    begin = time.perf_counter()
    while 1e3 * (time.perf_counter() - begin) < ms:
        call()
        synchronise()


# memory


def memory(call: Call, *, inputs: Iterable[Tensor], device: torch.device) -> dict[str, int]:
    """Call once to settle what stays, and measure a second call.

    Args:
        call:    to measure
        inputs:  what the caller holds through it
        device:  that they are on
    Returns:
        resident_bytes, on a CPU the inputs, on a GPU also workspaces that outlive a call; and
        peak_bytes, the allocated peak during the call beyond them.
    """
    call()
    gc.collect()
    on_gpu = device.type == "cuda"
    resident = (
        torch.cuda.memory_allocated(device) if on_gpu else sum(storage_bytes(inputs).values())
    )
    with growth(device) as found:
        call()
    return {"peak_bytes": found["peak_bytes"], "resident_bytes": resident}


@contextmanager
def growth(device: torch.device) -> Iterator[dict[str, int]]:
    """What a device's allocator hands out within, beyond what was there before.

    Args:
        device:  on a GPU its statistics are reset
    Returns:
        A dictionary that on leaving has peak_bytes, and left_bytes, which are there still.
    """
    found = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        found["left_bytes"] = torch.cuda.memory_allocated(device) - before
        return
    # the profiler announces itself on the terminal at the levels below
    with (
        mock.patch.dict(os.environ, KINETO_LOG_LEVEL="6"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        yield found
    events = enumerate(profiler.profiler.kineto_results.events())
    seen = sorted((e.start_ns(), i, e.nbytes()) for i, e in events if e.name() == "[memory]")
    live = list(accumulate((size for _, _, size in seen), initial=0))
    found |= {"peak_bytes": max(live), "left_bytes": live[-1]}


def saved_bytes(forward: Callable[[], Tensor], *, parameters: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of a forward keeps for its backward.

    Args:
        forward:     returns what the backward begins with
        parameters:  whose storages are left out; x and the modulation are not parameters
    """
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storage_bytes([tensor]))
        # an output of a node owns that node: held as it is, the two would never die
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    left_out = storage_bytes(parameters)
    total = sum(size for storage, size in saved.items() if storage not in left_out)
    del out  # until here, no saved storage gives its address to another
    return total


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage once, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}
