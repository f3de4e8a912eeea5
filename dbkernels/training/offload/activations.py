"""What a step keeps for its backward, in host memory until the backward comes to it.

Storages are moved, not tensors: one that several tensors view goes once and comes back as one. The
forward sends each off as soon as it is kept, and the backward fetches the last ones first. Copies
run beside the steps on a GPU, so at any time some storages lie on the device that no op reads now:
those on their way to the host, or fetched ahead. They have at most AHEAD times the bytes of the
largest of them. The steps wait for the copies of others before they go on.

Nothing is computed again, and every bit comes back as it was.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dbkernels.memory.plain import is_wrapper, plain_tensors
from dbkernels.training.offload.memory import CpuMemory

SMALLEST = 2**16  # bytes of a storage that is worth its copies
AHEAD = 3  # largest storages: about what one layer keeps where nothing is computed again
_WORD = 16  # bytes, of the widest dtype

Room = Callable[[int], Tensor]  # bytes -> (bytes,) uint8 off the device


class Copies:
    """Copies to the host and back: for a GPU beside the steps, through pages that are locked.

    Buffers of the host are used again. All that reads or writes them is in the stream of the
    copies, so one that was given back is safe to write to at once.

    Args:
        device:  that the steps run on
        room:    makes buffers; None is host memory
    """

    def __init__(self, device: torch.device, room: Room | None = None):
        self._device, self._room = device, room or CpuMemory(device).room
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unused: dict[int, list[Tensor]] = defaultdict(list)  # by their bytes

    def store(self, flat: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A buffer with what the steps that were launched leave in bytes (n,) of the device.

        Returns:
            It, and what `join` takes: the bytes must stay as they are until then.
        """
        unused = self._unused[len(flat)]
        home = unused.pop() if unused else self._room(len(flat))
        return home, self._copy(flat, home)

    def load(self, home: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Bytes (n,) of the device with what a buffer has, and what `join` takes before a read."""
        flat = torch.empty(len(home), dtype=torch.uint8, device=self._device)
        return flat, self._copy(home, flat)

    def give_back(self, home: Tensor) -> None:
        """Use a buffer again."""
        self._unused[len(home)].append(home)

    def join(self, copied: torch.cuda.Event | None) -> None:
        """Have the steps that follow wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def _copy(self, source: Tensor, to: Tensor) -> torch.cuda.Event | None:
        if self._stream is None:
            to.copy_(source)
            return None
        # for what they write to the source, and for those that had the memory of the other before
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()


class ActivationOffload:
    """Moves what the forwards within `around` keep for their backward.

    What lives anyway stays: parameters, buffers and the batch. So does what is small, or on another
    device, or held by `torch.utils.checkpoint`. Hooks for saved tensors that are around all of it
    are asked for what is on the device, so whoever counts that counts right.

    Args:
        model:    whose parameters and buffers stay
        device:   that the steps run on
        enabled:  whether it moves anything
    """

    def __init__(self, model: nn.Module, device: torch.device, *, enabled: bool = True):
        self._model, self._device = model, device
        self.copies = Copies(device) if enabled else None  # to the host and back
        self._hooks = _Hooks(_as_it_is, _as_it_is)
        self._living: set[int] = set()  # addresses of storages
        # its address is no one else's while a storage is known
        self._known: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()
        self._waiting: list[weakref.ref[_Storage]] = []  # in the order in which they were kept
        self._ahead: list[weakref.ref[_Storage]] = []  # on the device, and not asked for

    @contextmanager
    def around(self, batch: Iterable[Tensor]) -> Iterator[None]:
        """Move what is kept for the backward within.

        Args:
            batch:  tensors that live until the backward is through
        """
        if self.copies is None:
            yield
            return
        every = [*self._model.parameters(), *self._model.buffers(), *batch]
        plain = [inside for tensor in every for _, inside in plain_tensors("", tensor)]
        self._living = {tensor.untyped_storage()._cdata for tensor in plain}
        self._waiting = [kept for kept in self._waiting if kept() is not None]
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._hooks = _Hooks(*outer) if outer else _Hooks(_as_it_is, _as_it_is)
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> "_Saved | _Stayed":
        # a weight that FSDP2 has gathered since, which it lets go of by itself
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        tensor = tensor.detach()
        if is_weight or not self._moves(tensor):
            return _Stayed(self._hooks, self._hooks.pack(tensor), tensor._version)
        storage = tensor.untyped_storage()
        kept = self._known.get(storage._cdata)
        if kept is None:
            kept = self._known[storage._cdata] = self._sent_off(tensor)
            self._waiting.append(weakref.ref(kept))
            self._ahead.append(weakref.ref(kept))
            self._let_go()
        return _Saved(kept, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _sent_off(self, tensor: Tensor) -> "_Storage":
        assert self.copies is not None
        storage = tensor.untyped_storage()
        flat = tensor.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0).view(torch.uint8)
        stored = self.copies.store(flat)
        return _Storage(StorageWeakRef(storage), flat, stored, self.copies, self._hooks)

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_wrapper(tensor) or tensor.is_conj():
            return False
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        large = size >= SMALLEST and not size % _WORD
        return large and tensor.device == self._device and storage._cdata not in self._living

    def _unpack(self, saved: "_Saved | _Stayed") -> Tensor:
        if isinstance(saved, _Stayed):
            tensor = saved.hooks.unpack(saved.held)
            _require_unchanged(tensor._version == saved.version)
            return tensor
        flat = saved.storage.flat()
        self._fetch_ahead()
        return flat.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)

    def _let_go(self) -> None:
        """Have the host alone hold the oldest storages, where too many are on the device."""
        ahead = self._not_asked_for()
        while _too_many(ahead):
            ahead.pop(0).let_go()
        self._ahead = [weakref.ref(kept) for kept in ahead]

    def _fetch_ahead(self) -> None:
        """Fetch the storages that were kept last, where the device has room for them."""
        ahead = self._not_asked_for()
        while self._waiting:
            kept = self._waiting[-1]()
            if kept is not None and not kept.is_there():
                if _too_many([*ahead, kept]):
                    break
                kept.fetch()
                ahead.append(kept)
            self._waiting.pop()
        self._ahead = [weakref.ref(kept) for kept in ahead]

    def _not_asked_for(self) -> "list[_Storage]":
        every = [kept for ref in self._ahead if (kept := ref()) is not None]
        return [kept for kept in every if not kept.asked_for]


class _Hooks(NamedTuple):
    """What autograd asks in place of a saved tensor."""

    pack: Callable[[Tensor], object]
    unpack: Callable[[object], Tensor]


class _Storage:
    """A storage that is kept for the backward; it dies when the last tensor in it was used."""

    def __init__(
        self,
        source: StorageWeakRef,
        flat: Tensor,
        stored: tuple[Tensor, torch.cuda.Event | None],
        copies: Copies,
        hooks: _Hooks,
    ):
        # while this is held no other storage can have the address
        self._source, self.nbytes = source, len(flat)
        self._home, self._copied = stored
        self._copies, self._hooks = copies, hooks
        self._held: object = hooks.pack(flat)
        self._version: int | None = flat._version  # None while it arrives
        self._unchanged, self.asked_for = True, False

    def __del__(self) -> None:
        # its memory on the device may be used again from here on, which a copy must not meet
        self._join()
        self._copies.give_back(self._home)

    def is_there(self) -> bool:
        """Whether the device has it, or soon will."""
        return self._held is not None

    def fetch(self) -> None:
        """Start to bring it to the device."""
        flat, self._copied = self._copies.load(self._home)
        self._held = self._hooks.pack(flat)

    def let_go(self) -> None:
        """Leave it to the host alone, behind its copy."""
        self._unchanged &= self._settled()._version == self._version
        self._held = self._version = None

    def flat(self) -> Tensor:
        """Its bytes on the device, (n,) uint8; the same ones each time.

        Raises:
            RuntimeError: they were written over since.
        """
        if not self.is_there():
            self.fetch()
        self.asked_for, flat = True, self._settled()
        _require_unchanged(self._unchanged and flat._version == self._version)
        return flat

    def _settled(self) -> Tensor:
        self._join()
        flat = self._hooks.unpack(self._held)
        if self._version is None:
            self._version = flat._version
        return flat

    def _join(self) -> None:
        self._copies.join(self._copied)
        self._copied = None


class _Saved(NamedTuple):
    """What autograd holds in place of a tensor that was moved."""

    storage: _Storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Stayed(NamedTuple):
    """What autograd holds in place of a tensor that stays, and asks hooks for without a check."""

    hooks: _Hooks
    held: object
    version: int


def _require_unchanged(unchanged: bool) -> None:
    if not unchanged:
        raise RuntimeError(
            "a tensor that the backward needs must stay as it was, got one that was written over"
        )


def _too_many(ahead: list[_Storage]) -> bool:
    sizes = [kept.nbytes for kept in ahead]
    return sum(sizes) > AHEAD * max(sizes, default=0)


def _as_it_is(tensor: Any) -> Any:
    return tensor
