"""A predicted step in the layout of PyTorch's memory snapshots, for PyTorch's own viewer.

torch.cuda.memory._snapshot tells the layout; https://pytorch.org/memory_viz opens the file. In the
place of a stack trace, each block has the op that made it and what it was for.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path

from dbkernels.memory.allocator import SMALL_SEGMENT, Placement, place
from dbkernels.memory.predict import Prediction
from dbkernels.memory.trace import CATEGORIES, Event, Trace

BASE = 2**40  # address of the first segment: the viewer takes 0 for none
POOL = (0, 0)  # that of all who ask for no other


def write_timeline(path: Path, prediction: Prediction) -> None:
    """Write a predicted step as a snapshot that PyTorch's memory viewer opens.

    Args:
        path:        of the file, by custom .pickle; it is replaced
        prediction:  of a CPU it shows what a GPU's allocator would make of it
    """
    path.write_bytes(pickle.dumps(snapshot(prediction)))


def snapshot(prediction: Prediction) -> dict[str, list]:
    """The segments as the step leaves them, and all that happened before, in order."""
    trace = prediction.trace
    placement = prediction.placement or place(trace.events)
    return {
        "segments": list(_segments(trace, placement)),
        "device_traces": [list(_entries(trace, placement))],
    }


def _entries(trace: Trace, placement: Placement) -> Iterator[dict]:
    waiting = list(reversed(placement.segments))
    born: dict[int, list[dict]] = {}
    for time, (event, address) in enumerate(
        zip(placement.events, placement.addresses, strict=True)
    ):
        frames = _frames(trace, event)
        while waiting and waiting[-1][0] <= address:
            yield _entry("segment_alloc", *waiting.pop(), frames, time)
        if event.delta_bytes > 0:
            born[address] = frames
            yield _entry("alloc", address, event.delta_bytes, frames, time)
            continue
        for action in ("free_requested", "free_completed"):
            yield _entry(action, address, -event.delta_bytes, born[address], time)


def _entry(action: str, address: int, size: int, frames: list[dict], time: int) -> dict:
    return {
        "action": action,
        "addr": BASE + address,
        "size": size,
        "stream": 0,
        "pool_id": POOL,
        "time_us": time,
        "frames": frames,
    }


def _frames(trace: Trace, event: Event) -> list[dict]:
    phase, _, op = trace.name(event.op).partition(": ")
    category = CATEGORIES[trace.categories[event.storage]]
    return [
        {"name": op or phase, "filename": phase, "line": max(event.op, 0)},
        {"name": category, "filename": "category", "line": 0},
    ]


def _segments(trace: Trace, placement: Placement) -> Iterator[dict]:
    alive: dict[int, Event] = {}
    for event, address in zip(placement.events, placement.addresses, strict=True):
        if event.delta_bytes > 0:
            alive[address] = event
        else:
            del alive[address]
    for start, size in placement.segments:
        inside = sorted(address for address in alive if start <= address < start + size)
        used = sum(alive[address].delta_bytes for address in inside)
        yield {
            "device": 0,
            "address": BASE + start,
            "total_size": size,
            "allocated_size": used,
            "active_size": used,
            "stream": 0,
            "segment_type": "small" if size == SMALL_SEGMENT else "large",
            "segment_pool_id": POOL,
            "blocks": list(_blocks(trace, start, size, [(a, alive[a]) for a in inside])),
        }


def _blocks(trace: Trace, start: int, size: int, inside: list[tuple[int, Event]]) -> Iterator[dict]:
    """The blocks of one segment, with what is free between them."""
    end = start
    for address, event in inside:
        if address > end:
            yield _block(end, address - end, "inactive", [])
        end = address + event.delta_bytes
        yield _block(address, event.delta_bytes, "active_allocated", _frames(trace, event))
    if end < start + size:
        yield _block(end, start + size - end, "inactive", [])


def _block(address: int, size: int, state: str, frames: list[dict]) -> dict:
    return {
        "address": BASE + address,
        "size": size,
        "requested_size": size if frames else 0,
        "state": state,
        "frames": frames,
    }
