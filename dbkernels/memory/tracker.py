"""The birth and death of every storage of one device, in a trace.

Storages are counted, not tensors: a view adds nothing and a shared storage counts once. What a
storage was for is settled when the run is over, so a buffer that begins as a temporary of the
backward and ends as a parameter's gradient is a gradient all its life. Only sizes and lifetimes
are read, so fake tensors do as well as real ones.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.memory.flops import flops
from dbkernels.memory.trace import (
    CATEGORIES,
    INPUTS,
    SAVED,
    START,
    TEMPORARIES,
    WORKSPACES,
    Event,
    Trace,
)

Workspace = Callable[[OpOverload, tuple, dict], int]


_DEVICE_OF = torch.ops.prim.device.default


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
        device:     storages on other devices are left out
        workspace:  (op, args, kwargs) -> bytes that the op allocates inside itself and frees again
    """

    def __init__(self, device: torch.device, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.device, self.workspace = device, workspace
        self.optimizing = False  # names the phase of the ops that follow
        self.ops: list[str] = []  # phase and name of each op, in order
        self.events: list[Event] = []
        self.categories: list[int] = []  # of each storage, an index into CATEGORIES
        self.flops = 0
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

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Under another mode nothing is compiled. What compiled code allocates by ops is seen."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _DEVICE_OF:
            # asked of fake tensors, and often
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
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
        self.flops += flops(func, args, kwargs, out)
        if self.workspace and (size := self.workspace(func, args, kwargs)):
            self._use(size)
        return out

    def tag(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are for, before or during the run.

        Args:
            tensors:   those not met before count from now on
            category:  one of CATEGORIES; a storage keeps the first of all that it was given
        """
        for tensor in tensors:
            self._mark(self._meet(tensor, TEMPORARIES, self._now()), CATEGORIES.index(category))

    def trace(self) -> Trace:
        """The log, with each storage under the first of its categories."""
        # what was there before is logged when first met, and counts from the start
        events = sorted(self.events, key=lambda event: event.op)
        return Trace(self.ops, events, self.categories, self._saved_bytes(), self.flops)

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
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        index = self._alive.get(storage._cdata)
        if index is None:
            # asked last, since a fake tensor takes long to answer
            if tensor.device != self.device:
                return None
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

    def _use(self, size: int) -> None:
        """Log a workspace of the op of now."""
        storage = len(self.categories)
        self.categories.append(WORKSPACES)
        self._bytes.append(size)
        self.events += (Event(self._now(), storage, change) for change in (size, -size))

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


def _tensors(tree: object) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results; torch's own walk takes several times this."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
