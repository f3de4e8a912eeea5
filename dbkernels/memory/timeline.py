"""A predicted step op after op: in few numbers, as a picture, and as a snapshot of PyTorch's.

torch.cuda.memory._snapshot tells the layout of a snapshot; https://pytorch.org/memory_viz opens
the file. In the place of a stack trace, each block has the op that made it and what it was for.
"""

import pickle
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from dbkernels.memory.allocator import SMALL_SEGMENT, place
from dbkernels.memory.measure import Prediction
from dbkernels.memory.tracker import CATEGORIES, START
from dbkernels.settings import check_number
from dbkernels.whole_file import whole_file

GiB = 2**30
SIZE = (9.0, 4.5)  # inches
PARTS = 900  # about as many as the picture has columns, so that a .svg stays small
# Okabe and Ito's palette, which most eyes tell apart, and greys for what is always there
COLOURS = {
    "parameters": "#999999",
    "optimizer": "#BBBBBB",
    "inputs": "#F0E442",
    "saved_activations": "#D55E00",
    "gradients": "#CC79A7",
    "temporaries": "#56B4E9",
    "workspaces": "#000000",
}
BASE = 2**40  # address of the first segment: the viewer takes 0 for none
POOL = (0, 0)  # that of all who ask for no other
Entry = dict[str, Any]  # a JSON object


# in few numbers


@dataclass(frozen=True)
class Levels:
    """A step in parts of as many ops each, every part at its highest moment.

    Only ops that allocate or free count; before the first of them stands what is there already.
    """

    starts: list[int]  # first op of each part
    by_category: dict[str, list[int]]  # bytes of each of CATEGORIES, a number for each part
    phases: list[tuple[str, int]]  # such as "forward", and its first op

    @property
    def totals(self) -> list[int]:
        """Bytes of all categories, of each part."""
        return [sum(part) for part in zip(*self.by_category.values(), strict=True)]


def levels(prediction: Prediction, *, parts: int) -> Levels:
    """Follow a predicted step.

    Args:
        prediction:  of the step
        parts:       at most so many; a step with fewer ops has one for each
    Raises:
        ValueError: parts is below 1.
    """
    check_number("parts", parts, 1)
    assert prediction.trace is not None and prediction.blocks is not None
    columns, phases, size = [], [], attrgetter("total_bytes")
    for op, moments in groupby(prediction.blocks.moments(), attrgetter("op")):
        columns.append(max(moments, key=size))
        phases.append("" if op == START else prediction.trace.name(op).partition(":")[0])
    last = max((i for i, phase in enumerate(phases) if phase == "backward"), default=len(phases))
    # what follows is the norm of the gradients, and the optimizer
    phases[last + 1 :] = ["update"] * len(phases[last + 1 :])
    parts = min(parts, len(columns))
    edges = [part * len(columns) // parts for part in range(parts + 1)]
    highest = [max(columns[start:end], key=size) for start, end in pairwise(edges)]
    return Levels(
        starts=edges[:-1],
        by_category={name: [each.by_category[name] for each in highest] for name in CATEGORIES},
        phases=[
            (phase, next(ops)[0])
            for phase, ops in groupby(enumerate(phases), itemgetter(1))
            if phase
        ],
    )


# a picture


def draw(path: Path, prediction: Prediction, *, title: str = "") -> None:
    """Draw a predicted step into a file.

    Args:
        path:        its ending names the format: .png, .svg, .pdf
        prediction:  what to draw
        title:       above the picture
    Raises:
        ValueError: matplotlib is not installed, or does not know the format.
    """
    try:
        # not needed by anything else of the package
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "matplotlib must be installed for a picture (pip install dbkernels[demo]), "
            "got an environment without it"
        ) from None
    shown, peak = levels(prediction, parts=PARTS), prediction.peak_allocated_bytes
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    lines = [[size / GiB for size in shown.by_category[name]] for name in COLOURS]
    labels = [name.replace("_", " ") for name in COLOURS]
    axes.stackplot(shown.starts, lines, labels=labels, colors=COLOURS.values(), lw=0)
    axes.plot(shown.starts[shown.totals.index(peak)], peak / GiB, "v", color="black", markersize=4)
    end = shown.starts[-1] + 1
    # what is so narrow has no room for its name
    names = {
        start: phase
        for (phase, start), (_, until) in pairwise([*shown.phases, ("", end)])
        if until - start > 0.04 * end
    }
    axes.secondary_xaxis("top").set_xticks(list(names), list(names.values()), ha="left")
    for start in names:
        axes.axvline(start, color="black", lw=0.6, alpha=0.4)
    axes.margins(x=0)
    axes.set(title=f"{title}\n{peak / GiB:.2f} GiB, {prediction.at}".strip())
    axes.set(xlabel="ops, in order", ylabel="GiB allocated")
    # from top to bottom as in the stack
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    figure.savefig(path, dpi=150)


# a snapshot


def write_timeline(path: Path, prediction: Prediction) -> None:
    """Write a predicted step as a snapshot that PyTorch's memory viewer opens.

    Args:
        path:        of the file, by custom .pickle; it is replaced
        prediction:  of a CPU it shows what a GPU's allocator would make of it
    """
    with whole_file(path) as file:
        pickle.dump(snapshot(prediction), file)


def snapshot(prediction: Prediction) -> dict[str, list]:
    """The segments as the step leaves them, and all that happened before, in order."""
    trace = prediction.trace
    assert trace is not None
    events, allocator = place(trace.events)
    waiting = list(reversed(allocator.segments.items()))
    alive: dict[int, tuple[int, list[Entry]]] = {}  # bytes and frames of blocks, by their addresses
    entries: list[Entry] = []

    def log(action: str, address: int, size: int, stream: int, frames: list[Entry]) -> None:
        about = {"stream": stream, "pool_id": POOL, "time_us": len(entries), "frames": frames}
        entries.append({"action": action, "addr": BASE + address, "size": size, **about})

    for event in events:
        (phase, _, op), address = trace.name(event.op).partition(": "), event.address
        category = trace.categories[event.storage]
        frames = [
            {"name": op or phase, "filename": phase, "line": max(event.op, 0)},
            {"name": category, "filename": "category", "line": 0},
        ]
        while waiting and waiting[-1][0] <= address:
            log("segment_alloc", *waiting.pop(), event.stream, frames)
        if event.delta_bytes > 0:
            alive[address] = event.delta_bytes, frames
            log("alloc", address, event.delta_bytes, event.stream, frames)
        else:
            _, frames = alive.pop(address)
            for action in ("free_requested", "free_completed"):
                log(action, address, -event.delta_bytes, event.stream, frames)
    segments = [
        _segment(start, size, alive) | {"stream": allocator.streams[start]}
        for start, size in allocator.segments.items()
    ]
    return {"segments": segments, "device_traces": [entries]}


def _segment(start: int, size: int, alive: dict[int, tuple[int, list[Entry]]]) -> Entry:
    """A segment with its blocks, and what is free between them."""
    inside = [a for a in alive if start <= a < start + size]
    edges = {start, start + size, *inside, *(a + alive[a][0] for a in inside)}
    blocks = [
        {
            "address": BASE + address,
            "size": end - address,
            "requested_size": end - address if address in alive else 0,
            "state": "active_allocated" if address in alive else "inactive",
            "frames": alive[address][1] if address in alive else [],
        }
        for address, end in pairwise(sorted(edges))
    ]
    used = sum(alive[address][0] for address in inside)
    return {
        "device": 0,
        "address": BASE + start,
        "total_size": size,
        "allocated_size": used,
        "active_size": used,
        "segment_type": "small" if size == SMALL_SEGMENT else "large",
        "segment_pool_id": POOL,
        "blocks": blocks,
    }
