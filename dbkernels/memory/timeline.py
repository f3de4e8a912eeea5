"""A predicted step op after op: in few numbers, as a picture, and as a snapshot of PyTorch's.

torch.cuda.memory._snapshot tells the layout of a snapshot; https://pytorch.org/memory_viz opens
the file. In the place of a stack trace, each block has the op that made it and what it was for.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from dbkernels.memory.allocator import SMALL_SEGMENT, place
from dbkernels.memory.measure import Prediction
from dbkernels.memory.tracker import CATEGORIES, START

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
Entry = dict[str, object]


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
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    columns, phases = _columns(prediction)
    parts = min(parts, len(columns))
    edges = [part * len(columns) // parts for part in range(parts + 1)]
    highest = [max(columns[start:end], key=sum) for start, end in pairwise(edges)]
    return Levels(
        starts=edges[:-1],
        by_category=dict(zip(CATEGORIES, map(list, zip(*highest, strict=True)), strict=True)),
        phases=[
            (phase, i)
            for i, (before, phase) in enumerate(pairwise(["", *phases]))
            if phase not in ("", before)
        ],
    )


def _columns(prediction: Prediction) -> tuple[list[tuple[int, ...]], list[str]]:
    """Bytes of each category at the highest moment of each op, and each op's phase."""
    trace = prediction.blocks
    columns, phases = [], []
    for op, moments in groupby(trace.moments(), key=lambda moment: moment.op):
        columns.append(max(moments, key=lambda moment: moment.total_bytes).by_category)
        phases.append("" if op == START else trace.name(op).partition(":")[0])
    last = max((i for i, phase in enumerate(phases) if phase == "backward"), default=len(phases))
    # what follows is the norm of the gradients, and the optimizer
    phases[last + 1 :] = ["update"] * len(phases[last + 1 :])
    return columns, phases


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
    shown = levels(prediction, parts=PARTS)
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    lines = [[size / GiB for size in shown.by_category[name]] for name in COLOURS]
    labels = [name.replace("_", " ") for name in COLOURS]
    axes.stackplot(shown.starts, lines, labels=labels, colors=COLOURS.values(), lw=0)
    _mark_phases(axes, shown)
    _mark_peak(axes, shown, prediction)
    axes.set(title=title, xlabel="ops, in order", ylabel="GiB allocated")
    axes.set_xlim(0, shown.starts[-1])
    # from top to bottom as in the stack
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    figure.savefig(path, dpi=150)


def _mark_phases(axes, shown: Levels) -> None:
    end = shown.starts[-1] + 1
    for (phase, start), (_, until) in pairwise([*shown.phases, ("", end)]):
        # what is so narrow has no room for its name
        if until - start > 0.04 * end:
            axes.axvline(start, color="black", lw=0.6, alpha=0.4)
            axes.text(start, 1.0, f" {phase}", va="top", transform=axes.get_xaxis_transform())


def _mark_peak(axes, shown: Levels, prediction: Prediction) -> None:
    peak, totals = prediction.peak_allocated_bytes / GiB, shown.totals
    part = totals.index(max(totals))
    place = (shown.starts[part], peak)
    axes.set_ylim(0, 1.22 * peak)
    text = f"{peak:.2f} GiB\n{prediction.at}"
    # inside the axes also where the peak is at one end
    side = ("left", "center", "right")[3 * part // len(totals)]
    axes.annotate(text, place, (0, 6), textcoords="offset points", ha=side, fontsize=8)
    axes.plot(*place, "v", color="black", markersize=4)


# a snapshot


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
    waiting = list(reversed(placement.segments))
    alive: dict[int, Entry] = {}  # the blocks in use, by their addresses
    entries: list[Entry] = []

    def log(action: str, address: int, size: int, frames: list[Entry]) -> None:
        about = {"stream": 0, "pool_id": POOL, "time_us": len(entries), "frames": frames}
        entries.append({"action": action, "addr": BASE + address, "size": size, **about})

    for event, address in zip(placement.events, placement.addresses, strict=True):
        phase, _, op = trace.name(event.op).partition(": ")
        category = CATEGORIES[trace.categories[event.storage]]
        frames = [
            {"name": op or phase, "filename": phase, "line": max(event.op, 0)},
            {"name": category, "filename": "category", "line": 0},
        ]
        while waiting and waiting[-1][0] <= address:
            log("segment_alloc", *waiting.pop(), frames)
        if event.delta_bytes > 0:
            alive[address] = _block(address, event.delta_bytes, frames)
            log("alloc", address, event.delta_bytes, frames)
        else:
            frames = alive.pop(address)["frames"]
            for action in ("free_requested", "free_completed"):
                log(action, address, -event.delta_bytes, frames)
    segments = [_segment(start, size, alive) for start, size in placement.segments]
    return {"segments": segments, "device_traces": [entries]}


def _segment(start: int, size: int, alive: dict[int, Entry]) -> Entry:
    inside = sorted(address for address in alive if start <= address < start + size)
    used = sum(alive[address]["size"] for address in inside)
    return {
        "device": 0,
        "address": BASE + start,
        "total_size": size,
        "allocated_size": used,
        "active_size": used,
        "stream": 0,
        "segment_type": "small" if size == SMALL_SEGMENT else "large",
        "segment_pool_id": POOL,
        "blocks": list(_blocks(start, start + size, [alive[address] for address in inside])),
    }


def _blocks(start: int, end: int, inside: list[Entry]) -> Iterator[Entry]:
    """The blocks of one segment, with what is free between them."""
    for block in [*inside, _block(end, 0, [])]:
        if (gap := block["address"] - BASE - start) > 0:
            yield _block(start, gap, [])
        if block["size"]:
            yield block
        start = block["address"] - BASE + block["size"]


def _block(address: int, size: int, frames: list[Entry]) -> Entry:
    """A block; without frames it is free."""
    return {
        "address": BASE + address,
        "size": size,
        "requested_size": size if frames else 0,
        "state": "active_allocated" if frames else "inactive",
        "frames": frames,
    }
