"""What a run did to the memory of one device: births, changes of size and deaths of storages.

live(e) = sum of the bytes of the storages that are alive after event e
peak    = max over e of live(e)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

# a storage with several uses is counted under the first of them; buffers are parameters
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "inputs",
    "saved_activations",
    "temporaries",
    "workspaces",
)
INPUTS, SAVED, TEMPORARIES, WORKSPACES = 3, 4, 5, 6  # indices into CATEGORIES
START = -1  # stands for the op before the first


@dataclass(frozen=True)
class Event:
    """A storage that was born, changed its size or died."""

    op: int  # index into Trace.ops, or START
    storage: int  # index into Trace.categories
    delta_bytes: int


@dataclass(frozen=True)
class Moment:
    """What was alive after one event."""

    total_bytes: int
    by_category: tuple[int, ...]  # bytes of each of CATEGORIES
    op: int  # of the event


@dataclass(frozen=True)
class Trace:
    """One run, with each storage under the first of its uses.

    Args:
        ops:         phase and name of each op, such as "backward: aten::mm"
        events:      in order of time
        categories:  of each storage, an index into CATEGORIES
        saved:       highest bytes that were held for the backward; no parameters, no inputs
        flops:       floating-point operations of matmuls, convolutions and attention
    """

    ops: Sequence[str]
    events: Sequence[Event]
    categories: Sequence[int]
    saved: int = 0
    flops: int = 0

    def moments(self) -> Iterator[Moment]:
        """What was alive after each event."""
        live, by_category = 0, [0] * len(CATEGORIES)
        for event in self.events:
            live += event.delta_bytes
            by_category[self.categories[event.storage]] += event.delta_bytes
            yield Moment(live, tuple(by_category), event.op)

    def peak(self) -> Moment:
        """The first of the moments with the most bytes; of nothing at all, if there was no more."""
        nothing = Moment(0, (0,) * len(CATEGORIES), START)
        return max(self.moments(), key=lambda moment: moment.total_bytes, default=nothing)

    def name(self, op: int) -> str:
        """Phase and name of an op; "start" before the first."""
        return "start" if op == START else self.ops[op]

    def beside(self, storages: Iterable[tuple[str, int]]) -> "Trace":
        """The same run with more that is there from the start to the end.

        Args:
            storages:  category and bytes of each
        """
        storages, first = list(storages), len(self.categories)
        categories = [CATEGORIES.index(category) for category, _ in storages]
        births = [Event(START, first + i, size) for i, (_, size) in enumerate(storages)]
        return replace(
            self, events=[*births, *self.events], categories=[*self.categories, *categories]
        )

    def of(self, events: Sequence[Event]) -> "Trace":
        """The same run with events of other sizes."""
        return replace(self, events=events)
