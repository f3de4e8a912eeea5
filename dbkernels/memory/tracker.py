"""What a run did to the memory of one device: births, changes of size and deaths of storages.

live(e) = sum of the bytes of the storages that are alive after event e
peak    = max over e of live(e)

Storages are counted, not tensors: a view adds nothing and a shared storage counts once. What a
storage was for is settled when the run is over, so a buffer that begins as a temporary of the
backward and ends as a parameter's gradient is a gradient all its life. Only sizes and lifetimes
are read, so fake tensors do as well as real ones.

Floating-point operations are counted beside, by torch's own formulas: a multiplication and an
addition are two, elementwise ops are none.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import attrgetter
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch._guards import active_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dbkernels.memory.plain import is_wrapper, plain_tensors
from dbkernels.memory.sharded import seeing_resizes, whole

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
START = -1  # stands for the op before the first
OPTIMIZER = "optimizer"  # a phase

Workspace = Callable[[OpOverload, tuple, dict], int]  # bytes that an op allocates inside itself
_DEVICE_OF = torch.ops.prim.device.default
_aten = torch.ops.aten
# ops that torch's table of formulas lacks, and those that take as many operations
_LIKE = {
    _aten.addmm_: _aten.addmm,
    _aten._addmm_activation: _aten.addmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


class Event(NamedTuple):
    """A storage that was born, changed its size or died."""

    op: int  # index into Trace.ops, or START
    storage: int  # index into Trace.categories
    delta_bytes: int
    address: int = 0  # of its block, where an allocator has given it one
    stream: int = 0  # of the device, in the order in which they are met


class Moment(NamedTuple):
    """What was alive after one event."""

    op: int  # of the event
    by_category: dict[str, int]  # bytes of each of CATEGORIES

    @property
    def total_bytes(self) -> int:
        """Of all categories."""
        return sum(self.by_category.values())


@dataclass(frozen=True)
class Trace:
    """One run, with each storage under the first of its uses.

    Args:
        ops:         phase and name of each op, such as "backward: aten::mm"
        events:      in order of time
        categories:  of each storage
        saved:       highest bytes that were held for the backward; no parameters, no inputs
        flops:       floating-point operations of matmuls, convolutions and attention
        updating:    those of them that are the optimizers'
    """

    ops: Sequence[str]
    events: Sequence[Event]
    categories: Sequence[str]
    saved: int = 0
    flops: int = 0
    updating: int = 0

    @property
    def updates(self) -> int:
        """How many of the ops are the optimizers'."""
        return sum(op.startswith(f"{OPTIMIZER}: ") for op in self.ops)

    def moments(self) -> Iterator[Moment]:
        """What was alive after each event."""
        by_category = dict.fromkeys(CATEGORIES, 0)
        for event in self.events:
            by_category[self.categories[event.storage]] += event.delta_bytes
            yield Moment(event.op, by_category.copy())

    def peak(self) -> Moment:
        """The first of the moments with the most bytes; of nothing at all, if there was no more."""
        nothing = Moment(START, dict.fromkeys(CATEGORIES, 0))
        return max(self.moments(), key=attrgetter("total_bytes"), default=nothing)

    def name(self, op: int) -> str:
        """Phase and name of an op; "start" before the first."""
        return "start" if op == START else self.ops[op]

    def beside(self, storages: Iterable[tuple[str, int]]) -> "Trace":
        """The same run with more that is there from the start to the end.

        Args:
            storages:  category and bytes of each
        """
        categories, births = list(self.categories), []
        for category, size in storages:
            births.append(Event(START, len(categories), size))
            categories.append(category)
        return replace(self, events=[*births, *self.events], categories=categories)


class _Saved:
    """What autograd holds in place of a saved tensor. It dies when autograd lets go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # an output of a node owns that node: held as it is, the two would never die
        self.tensor = tensor.detach()


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
        self.categories: list[str] = []  # of each storage
        self.flops = self.updating = 0
        self._bytes: list[int] = []  # of each storage, when last met
        self._holds: list[tuple[int, int]] = []  # storage; +1 autograd takes it, -1 it lets go
        self._alive: dict[int, int] = {}  # address of a storage -> its index
        self._streams: dict[torch.cpu.Stream, int] = {torch.cpu.current_stream(): 0}
        self._watches: list[weakref.finalize] = []
        self._reused: tuple[int | None, int] | None = None  # storage, position of the op in events
        self._seeing = ExitStack()

    def __enter__(self) -> "Tracker":
        super().__enter__()
        saved = torch.autograd.graph.saved_tensors_hooks(self._pack, attrgetter("tensor"))
        self._seeing.enter_context(saved)
        self._seeing.enter_context(seeing_resizes(self._resize))
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seeing.close()
        super().__exit__(kind, error, trace)
        for watch in self._watches:
            watch.detach()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Under another mode nothing is compiled. What compiled code allocates by ops is seen."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(is_wrapper, types)):
            # its own ops come here one by one
            return NotImplemented
        if func is _DEVICE_OF:
            # asked of fake tensors, and often
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        # what torch.tensor makes reaches an op for the first time as the argument of this one
        if func is not torch.ops.aten.lift_fresh.default:
            for tensor in _tensors((args, kwargs)):
                self._meet(tensor, before=True)
        out, phase, name = func(*args, **kwargs), self._phase(), func.name()
        self.ops.append(f"{phase}: {name}")
        self._reused = None
        if phase == "backward" and _merges_gradients(func):
            self._reused = self._meet(args[0]), len(self.events)
        for tensor in _tensors(out):
            self._meet(tensor)
        if told := whole(name, args, kwargs):
            self.tag(_tensors(told[0]), told[1])
        packet = func.overloadpacket
        if formula := flop_registry.get(_LIKE.get(packet, packet)):
            flops = formula(*args, **kwargs, out_val=out)
            self.flops += flops
            self.updating += flops * (phase == OPTIMIZER)
        if self.workspace and (size := self.workspace(func, args, kwargs)):
            storage = len(self.categories)
            self.categories.append("workspaces")
            self._bytes.append(size)
            self.events += (Event(self._now(), storage, change) for change in (size, -size))
        return out

    def tag(self, tensors: Iterable[object], category: str) -> None:
        """Say what tensors are for, before or during the run.

        Args:
            tensors:   those not met before count from now on; what is no tensor is passed over
            category:  one of CATEGORIES; a storage keeps the first of all that it was given
        """
        for tensor in tensors:
            for _, plain in plain_tensors("", tensor) if isinstance(tensor, Tensor) else ():
                if (index := self._meet(plain)) is not None:
                    both = self.categories[index], category
                    self.categories[index] = min(both, key=CATEGORIES.index)

    def trace(self) -> Trace:
        """The log, with each storage under the first of its categories."""
        # what was there before is logged when first met, and counts from the start
        events = sorted(self.events, key=attrgetter("op"))
        told = self._saved_bytes(), self.flops, self.updating
        return Trace(self.ops, events, self.categories, *told)

    def _saved_bytes(self) -> int:
        held, highest = 0, 0
        holders: Counter[int] = Counter()
        for storage, change in self._holds:
            holders[storage] += change
            is_first_or_last = holders[storage] == max(change, 0)
            if is_first_or_last and self.categories[storage] == "saved_activations":
                held += change * self._bytes[storage]
                highest = max(highest, held)
        return highest

    def _meet(self, tensor: Tensor, *, before: bool = False) -> int | None:
        """Index of the tensor's storage; None if it is not counted."""
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        # asked last, since a fake tensor takes long to answer
        if storage._cdata not in self._alive and tensor.device != self.device:
            return None
        return self._follow(storage, storage.nbytes() if before else None)

    def _resize(self, storage: UntypedStorage, before: int) -> None:
        # that of a fake tensor does not say where the tensor lies
        if storage.device == self.device or active_fake_mode() is not None:
            self._follow(storage, before)

    def _follow(self, storage: UntypedStorage, before: int | None) -> int:
        """Index of a storage, and a log entry if it is new or has changed its size.

        One that is new had so many bytes before the run, or is made now.
        """
        index = self._alive.get(storage._cdata)
        if index is None:
            index = self._alive[storage._cdata] = len(self.categories)
            self.categories.append("temporaries" if before is None else "inputs")
            self._bytes.append(0)
            self._watches.append(weakref.finalize(storage, self._die, storage._cdata))
            self._change(index, before or 0, START)
        self._change(index, storage.nbytes(), self._now())
        return index

    def _change(self, index: int, size: int, op: int) -> None:
        if delta := size - self._bytes[index]:
            self._bytes[index] = size
            # a CPU's are no more than names, which is enough for a device that is predicted
            stream = self._streams.setdefault(torch.cpu.current_stream(), len(self._streams))
            self.events.append(Event(op, index, delta, stream=stream))

    def _die(self, address: int) -> None:
        index = self._alive.pop(address)
        death = Event(self._now(), index, -self._bytes[index])
        if self._reused is not None and self._reused[0] == index:
            self.events.insert(self._reused[1], death)
        else:
            self.events.append(death)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved, index = _Saved(tensor), self._meet(tensor, before=True)
        if index is not None:
            self.tag([tensor], "saved_activations")
            self._holds.append((index, 1))
            self._watches.append(weakref.finalize(saved, self._holds.append, (index, -1)))
        return saved

    def _now(self) -> int:
        return len(self.ops) - 1

    def _phase(self) -> str:
        if self.optimizing:
            return OPTIMIZER
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
