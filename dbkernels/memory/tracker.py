"""The birth and death of every storage of one device, and the peak that follows from them.

    live(e) = sum of the bytes of the storages that are alive after event e
    peak    = max over e of live(e)

Storages are counted, not tensors: a view adds nothing and a shared storage counts once. What a
storage was for is settled when the run is over, so a buffer that begins as a temporary of the
backward and ends as a parameter's gradient is a gradient all its life. Only sizes and lifetimes
are read, so fake tensors do as well as real ones.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# a storage with several uses is counted under the first of them; buffers are parameters
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "inputs",
    "saved_activations",
    "temporaries",
)
INPUTS, SAVED, TEMPORARIES = 3, 4, 5  # indices into CATEGORIES
START = -1  # stands for the op before the first


@dataclass(frozen=True)
class Peak:
    """What was alive on one device at the highest moment of a callable."""

    total_bytes: int
    by_category: dict[str, int]  # bytes of each of CATEGORIES at that moment; sums to total_bytes
    saved_bytes: int  # held for the backward, at their own highest; no parameters, no inputs
    at: str  # phase and op, such as "backward: aten::mm"; "start" before the first op
    allocated_bytes: int | None = None  # the CUDA allocator's own peak; None off CUDA
    reserved_bytes: int | None = None  # what that allocator took from the driver; None off CUDA


@dataclass(frozen=True)
class Event:
    """A storage that was born, changed its size or died."""

    op: int  # index into Tracker.ops, or START
    storage: int  # index into Tracker.categories
    delta_bytes: int


class _Saved:
    """What autograd holds in place of a saved tensor. It dies when autograd lets go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # an output of a node owns that node: held as it is, the two would never die
        self.tensor = tensor.detach()


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


class Tracker(TorchDispatchMode):
    """Log the storages of one device while the mode is on. Enter it once.

    A tensor first met as an argument, or as saved for the backward, was there before: it counts
    from the start and as an input. What a region saves under hooks of its own, as a checkpointed
    one does, is not a saved activation. Only strided tensors are counted.

    Args:
        device: storages on other devices are left out
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.optimizing = False  # names the phase of the ops that follow
        self.ops: list[str] = []  # phase and name of each op, in order
        self.events: list[Event] = []
        self.categories: list[int] = []  # of each storage, an index into CATEGORIES
        self._bytes: list[int] = []  # of each storage, when last met
        self._holds: list[tuple[int, int]] = []  # storage; +1 autograd takes it, -1 it lets go
        self._alive: dict[int, int] = {}  # address of a storage -> its index
        self._watches: dict[int, weakref.ref] = {}
        self._reused: tuple[int | None, int] | None = None  # storage, position of the op in events
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "Tracker":
        super().__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)
        super().__exit__(*exception)
        self._watches.clear()
        self._alive.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # what torch.tensor makes reaches an op for the first time as the argument of this one
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in _tensors((args, kwargs)):
                self._meet(tensor, INPUTS, START)
        out = func(*args, **kwargs)
        self.ops.append(f"{self._phase()}: {func.name()}")
        self._reused = None
        if self._phase() == "backward" and _merges_gradients(func):
            self._reused = self._meet(args[0], TEMPORARIES, self._now()), len(self.events)
        for tensor in _tensors(out):
            self._meet(tensor, TEMPORARIES, self._now())
        return out

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are for, before or during the run.

        Args:
            tensors:   those not met before count from now on
            category:  one of CATEGORIES; a storage keeps the first of all that it was given
        """
        for tensor in tensors:
            self._mark(self._meet(tensor, TEMPORARIES, self._now()), CATEGORIES.index(category))

    def peak(self) -> Peak:
        """Replay the log, with each storage under the first of its categories."""
        live, by_category = 0, [0] * len(CATEGORIES)
        highest, snapshot, at = 0, by_category.copy(), START
        # what was there before is logged when first met, and counts from the start
        for event in sorted(self.events, key=lambda event: event.op):
            live += event.delta_bytes
            by_category[self.categories[event.storage]] += event.delta_bytes
            if live > highest:
                highest, snapshot, at = live, by_category.copy(), event.op
        return Peak(
            total_bytes=highest,
            by_category=dict(zip(CATEGORIES, snapshot, strict=True)),
            saved_bytes=self._saved_bytes(),
            at="start" if at == START else self.ops[at],
        )

    def _saved_bytes(self) -> int:
        held, highest, holders = 0, 0, Counter()
        for storage, change in self._holds:
            if self.categories[storage] != SAVED:
                continue
            before = holders[storage]
            holders[storage] += change
            held += (bool(holders[storage]) - bool(before)) * self._bytes[storage]
            highest = max(highest, held)
        return highest

    def _meet(self, tensor: Tensor, category: int, born: int) -> int | None:
        """Index of the tensor's storage, and a log entry if it is new or has changed its size."""
        if tensor.device != self.device or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        index = self._alive.get(storage._cdata)
        if index is None:
            index = self._alive[storage._cdata] = len(self.categories)
            self.categories.append(category)
            self._bytes.append(0)
            self._watch(storage, lambda address=storage._cdata: self._die(address))
        else:
            born = self._now()
        if delta := storage.nbytes() - self._bytes[index]:
            self._bytes[index] += delta
            self.events.append(Event(born, index, delta))
        return index

    def _mark(self, index: int | None, category: int) -> None:
        if index is not None:
            self.categories[index] = min(self.categories[index], category)

    def _die(self, address: int) -> None:
        index = self._alive.pop(address)
        death = Event(self._now(), index, -self._bytes[index])
        if self._reused is not None and self._reused[0] == index:
            self.events.insert(self._reused[1], death)
        else:
            self.events.append(death)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved, index = _Saved(tensor), self._meet(tensor, INPUTS, START)
        if index is not None:
            self._mark(index, SAVED)
            self._holds.append((index, 1))
            self._watch(saved, lambda: self._holds.append((index, -1)))
        return saved

    def _watch(self, thing: object, on_death: Callable[[], None]) -> None:
        def gone(_: weakref.ref, key: int = id(thing)) -> None:
            del self._watches[key]
            on_death()

        self._watches[id(thing)] = weakref.ref(thing, gone)

    def _now(self) -> int:
        return len(self.ops) - 1

    def _phase(self) -> str:
        if self.optimizing:
            return "optimizer"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def _merges_gradients(func: torch._ops.OpOverload) -> bool:
    """Whether an op of a backward is the engine's sum of the gradients of two uses of a tensor.

    Without a mode the engine adds into the first of them if nobody else holds it. Under one it
    never does, which would count that gradient once too often.
    """
    return (
        func is torch.ops.aten.add.Tensor
        and not torch.is_grad_enabled()
        # the backward of a Function may add for itself, and then does allocate
        and not isinstance(torch._C._current_autograd_node(), BackwardCFunction)
    )


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
