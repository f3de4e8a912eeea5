"""What a checkpoint will hold, copied to the host as it is at one moment."""

import mmap
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dbkernels.memory.units import in_words
from dbkernels.training.checkpoint.part import Part
from dbkernels.training.checkpoint.shard import Tensors
from dbkernels.training.offload.memory import flat_bytes, pin
from dbkernels.training.tensor_file import Read


class HostCopy:
    """One buffer of the host, which each copy uses again; page-locked where a GPU's are copied."""

    def __init__(self) -> None:
        self._room: _Room | None = None

    def of(self, part: Part, read: Read) -> Part:
        """Copy what a process writes; what was copied before is gone then.

        Args:
            part:  of any devices
            read:  gives the bytes of a tensor of the host
        Returns:
            The same on the host, of which no later write changes a bit.
        """
        every = [tensor for named in part.tensors.values() for tensor in named.values()]
        nbytes, devices = (
            flat_bytes(t.nbytes for t in every),
            {t.device for t in every if t.is_cuda},
        )
        if self._room is None or not self._room.serves(nbytes, devices):
            # the smaller one is freed before the larger one is made
            self._room = None
            self._room = _Room(nbytes, devices)
        copies: Tensors = {}
        first = 0
        for group, named in part.tensors.items():
            copies[group] = {}
            for name, tensor in named.items():
                place = self._room.buffer[first : first + tensor.nbytes]
                _copy(tensor, place, read)
                copies[group][name] = place.view(tensor.dtype).view(tensor.shape)
                first += flat_bytes([tensor.nbytes])
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return replace(part, tensors=copies)

    def free(self) -> None:
        """Give the buffer back."""
        self._room = None


def _copy(tensor: Tensor, place: Tensor, read: Read) -> None:
    if tensor.is_cuda:
        source = tensor.detach()
        place.view(tensor.dtype).view(tensor.shape).copy_(source, non_blocking=True)
        return
    first = 0
    for piece in read(tensor):
        place[first : first + len(piece)] = piece
        first += len(piece)


class _Room:
    """A buffer (nbytes,) uint8 of the host."""

    def __init__(self, nbytes: int, devices: Iterable[torch.device]):
        # pages of its own, as they are locked one by one
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self._devices = set(devices)
        for device in sorted(self._devices, key=str)[:1]:
            if pin(self.buffer, device):
                weakref.finalize(self, _unpin, self.buffer)
            else:
                warnings.warn(
                    f"{in_words(nbytes)} of host memory cannot be page-locked: steps wait about "
                    "twice as long for the copies of a checkpoint",
                    stacklevel=2,
                )

    def serves(self, nbytes: int, devices: Iterable[torch.device]) -> bool:
        return nbytes <= len(self.buffer) and self._devices >= set(devices)


def _unpin(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
