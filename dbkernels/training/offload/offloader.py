"""Which blocks are on the device.

The device holds what the blocks share, and the parameters, optimizer state and moving average of
the block that is being trained, in one flat buffer: the slot. Frozen parameters of its layers lie
there too, and are never copied back. Each other block is at home, in host memory or on disk
(`memory`). A parameter stays the same object wherever it lies, so a block at home
can be read, saved and restored as ever.

The slot is never replaced, and blocks of equal layers lie in it at the same addresses. A captured
CUDA graph of a block is therefore valid whenever the block is on the device. With prefetching there
are two slots and a block may lie in either, so each block needs a graph for each slot.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from dbkernels.ops.layer.gradients import is_quantized
from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks
from dbkernels.training.offload.copy_stream import CopyStream
from dbkernels.training.offload.memory import (
    ALIGNMENT,
    CpuMemory,
    DiskMemory,
    OffloadMemory,
    flat_bytes,
    views,
)
from dbkernels.training.optimizers.kind import Kind
from dbkernels.training.param_group import ParamGroup, tensor_sizes
from dbkernels.training.tensor_file import Pieces, pieces
from dbkernels.training.trainer_config import Offload, TrainerConfig


def open_offloader(
    models: DiffusionBlocks, device: torch.device, config: TrainerConfig, kind: Kind
) -> "Offloader":
    """The offloader for a configuration and an optimizer; it has adopted no group yet.

    Until it adopts a group it moves nothing.

    Raises:
        ValueError: a block's steps read layers of others, the disk has no room for the blocks, or a
            weight has fewer bits than its dtype says.
    """
    check_offload(config.offload, models.model.independent, len(models))
    for name, parameter in models.named_parameters():
        # its numbers and its scales lie in storages that its class alone knows
        if config.offload != "none" and is_quantized(parameter):
            of = type(parameter).__name__
            raise ValueError(f"offload must be none with {name} of {of}, got {config.offload}")
    memory: OffloadMemory = CpuMemory(device)
    if config.offload == "disk":
        groups = models.groups().items()
        own = {n: p for name, group in groups if name != SHARED for n, p in group.items()}
        frozen = [p.nbytes for parameters in models.frozen().values() for p in parameters]
        size = flat_bytes([*tensor_sizes(own, config, kind), *frozen])
        memory = DiskMemory(Path(config.offload_dir), size, device)
    return Offloader(models, device, memory, prefetch=config.prefetch, idle=models.idle())


def device_of(
    blocks: DiffusionBlocks,
    config: TrainerConfig,
    device: torch.device | str | None,
    *,
    shared_out: bool = False,
) -> torch.device:
    """Where a trainer steps blocks: on a device that was named, or where they are.

    Args:
        shared_out:  whether each layer comes to the device when it is shared out
    Raises:
        ValueError: they are elsewhere and would stay there.
    """
    home = blocks.device
    # tensors on "cuda" say "cuda:0"
    device = home if device is None else torch.empty(0, dtype=torch.uint8, device=device).device
    if config.offload == "none" and not shared_out and device != home:
        raise ValueError(f"blocks must be on {device} where offload is none, got {home}")
    return device


def check_offload(offload: Offload, independent: bool, num_blocks: int) -> None:
    """Whether a block may be on the device without the others."""
    if offload != "none" and not independent and num_blocks > 1:
        raise ValueError(
            f"offload must be none where a block's steps read layers of others, got {offload}"
        )


class Offloader:
    """Swaps blocks between the device and their homes. Blocks that it has not adopted stay, and
    so do layers that no block runs.

    With prefetching a block may still be on its way home: who reads it there must `wait`,
    and who writes it there must `settle`.

    Args:
        models:    the blocks, on the host
        device:    to train on
        memory:    of the blocks that are not being trained
        prefetch:  whether the device has a second slot, filled while steps run
        idle:      parameters that no step reads: they stay where they are
    """

    def __init__(
        self,
        models: nn.Module,
        device: torch.device,
        memory: OffloadMemory,
        *,
        prefetch: bool,
        idle: Sequence[Tensor] = (),
    ):
        self._models, self._device, self._memory, self._prefetch = models, device, memory, prefetch
        self._copy_stream = CopyStream(device, beside=prefetch)
        self._idle = set(map(id, idle))
        self._blocks: dict[str, _Flat] = {}
        self._shared: list[Tensor] = []
        self._slots: list[Tensor] = []
        self.slot = 0  # which one the current block lies in
        self._current = self._ahead = ""  # names of the block on the device and of the next one
        self._entered = ""  # the current one when all of it lies there, which takes a while
        self._arrival: Future | None = None  # of the next one

    def adopt(self, name: str, group: ParamGroup, frozen: Sequence[Tensor] = ()) -> None:
        """Take charge of a group: a block's own goes home, the shared one to the device.

        Args:
            name:    of the group
            group:   that is updated
            frozen:  what only the steps of this group read, and none updates
        """
        if name == SHARED:
            self._shared = group.tensors()
        else:
            self._blocks[name] = _Flat(group.tensors(), frozen, self._memory)

    def enter(self, name: str) -> None:
        """Have a block on the device for the steps that follow, and take the one there home."""
        self._copy_stream.require_thread()
        if name == self._entered or name not in self._blocks:
            return
        self._open()
        self._leave()
        if name != self._ahead:
            self._fetch(name)
        self._copy_stream.join(self._arrival)
        self._ahead, self.slot, self._current = "", self._other_slot(), name
        self._blocks[name].lie_in(self._slots[self.slot])
        self._entered = name

    def prefetch(self, name: str) -> None:
        """Start to bring the next block beside the steps, where there is a slot for it."""
        if self._prefetch and name in self._blocks and name not in (self._current, self._ahead):
            self._open()
            self._fetch(name)

    def wait(self) -> None:
        """Return when what was copied can be read on the host."""
        self._copy_stream.wait()

    def read(self, tensor: Tensor) -> Pieces:
        """A tensor's bytes as `tensor_file.pieces` gives them, also of a block that is at home.

        Raises:
            ValueError: the file that it rests in was cut short or has other bytes.
        """
        if isinstance(self._memory, DiskMemory):
            for flat in self._blocks.values():
                first = tensor.data_ptr() - flat.home.data_ptr()
                if 0 <= first < len(flat.home):
                    flat.seal()
                    return _in_order(tensor, self._memory.read(flat.home, first, tensor.nbytes))
        return pieces(tensor)

    def settle(self) -> None:
        """Bring every block home, where it can be read and written."""
        self._leave()
        self._ahead = ""
        self.wait()

    def close(self) -> None:
        """Bring everything to the host and free the slot; `enter` opens it again."""
        self.settle()
        self._slots = []
        # also where it was moved and no room was left for a slot
        if self._blocks:
            self._move_common("cpu")

    def swap_seconds(self) -> float:
        """Time the way of the current block home and back; it stays where it is."""
        self.wait()
        begin = perf_counter()
        self._store()
        self._load(self._current, self._slots[self.slot])
        self.wait()
        return perf_counter() - begin

    def _open(self) -> None:
        if not self._slots:
            size = max(len(flat.home) for flat in self._blocks.values())
            self._move_common(self._device)
            self._slots = [
                torch.empty(size, dtype=torch.uint8, device=self._device)
                for _ in range(1 + self._prefetch)
            ]
            # the memory may be that of steps which still run
            self._copy_stream.follow()

    def _move_common(self, device: torch.device | str) -> None:
        """Move all that is no block's own and that a step reads, buffers too."""
        stay = {id(tensor) for flat in self._blocks.values() for tensor in flat.tensors}
        stay |= self._idle
        every = [*self._models.parameters(), *self._models.buffers(), *self._shared]
        for tensor in every:
            if id(tensor) not in stay:
                tensor.data = tensor.data.to(device)

    def _fetch(self, name: str) -> None:
        self._blocks[name].require_home(name)
        self._blocks[name].seal()
        self._ahead = ""
        self._arrival = self._load(name, self._slots[self._other_slot()])
        self._ahead = name

    def _leave(self) -> None:
        self._entered = ""
        if self._current:
            self._store()
            flat = self._blocks[self._current]
            flat.lie_in(flat.home)
            flat.note()
            self._current = ""

    def _other_slot(self) -> int:
        return (self.slot + 1) % len(self._slots)

    def _load(self, name: str, slot: Tensor) -> Future | None:
        home = self._blocks[name].home
        return self._copy_stream.submit(partial(self._memory.load, home, slot[: len(home)]))

    def _store(self) -> None:
        flat, slot = self._blocks[self._current], self._slots[self.slot]
        size = flat.updated_bytes
        if not size:
            return
        copy = partial(self._memory.store, slot[:size], flat.home[:size])
        self._copy_stream.submit(copy, after_steps=True)


def _in_order(tensor: Tensor, found: Pieces) -> Pieces:
    """Elements in their order, where bytes are in that of the memory that they lie in."""
    if tensor.is_contiguous():
        return found
    whole = torch.cat(list(found)).view(tensor.dtype)
    return pieces(whole.as_strided(tensor.shape, tensor.stride()))


class _Flat:
    """A block's own tensors, which all lie in one buffer: at home, or in a slot."""

    def __init__(self, updated: Sequence[Tensor], frozen: Sequence[Tensor], memory: OffloadMemory):
        self.tensors, self._memory = [*updated, *frozen], memory
        self.updated_bytes = flat_bytes(tensor.nbytes for tensor in updated)
        # a block that has nothing of its own has a buffer too
        size = max(flat_bytes(tensor.nbytes for tensor in self.tensors), ALIGNMENT)
        self.home = memory.room(size)
        for tensor, view in zip(self.tensors, views(self.home, self.tensors), strict=True):
            view.copy_(tensor.detach())
        self.lie_in(self.home)
        self._versions: list[int] = []
        self.seal()

    def note(self) -> None:
        """Say that the home holds, or will when all was copied, what the block is now."""
        self._versions = [tensor._version for tensor in self.tensors]

    def seal(self) -> None:
        """At home: have the memory take over what the host has written there, if it has."""
        written = [tensor._version for tensor in self.tensors]
        if written != self._versions:
            self._memory.seal(self.home, self.updated_bytes)
            self._versions = written

    def lie_in(self, buffer: Tensor) -> None:
        """Give each tensor its place in a buffer; nothing is copied."""
        for tensor, view in zip(self.tensors, views(buffer, self.tensors), strict=True):
            tensor.data = view

    def require_home(self, name: str) -> None:
        found, homes = self.tensors, views(self.home, self.tensors)
        if [tensor.data_ptr() for tensor in found] != [home.data_ptr() for home in homes]:
            raise ValueError(
                f"the tensors of {name} must be where training left them, got some that were "
                "moved since"
            )
