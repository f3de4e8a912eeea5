"""Where a block is that is not being trained: host memory, or a file.

Its tensors lie in one flat buffer there, and in one just like it while it is on the device.
"""

import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dbkernels.memory.units import in_words
from dbkernels.training.offload import rest_file
from dbkernels.training.offload.rest_file import Held, RestFile

# bytes; that of the CUDA allocator: some kernels are chosen by it, and so may be their last bits
ALIGNMENT = 512


def flat_bytes(sizes: Iterable[int]) -> int:
    """Bytes of one buffer that holds tensors of these sizes in bytes."""
    return sum(_aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for tensors in a flat buffer, one after another, with their dtypes and strides.

    Args:
        buffer:   (>= flat_bytes,) uint8, of any device
        tensors:  dense
    """
    found, first = [], 0
    for tensor in tensors:
        piece = buffer[first : first + tensor.nbytes].view(tensor.dtype)
        found.append(piece.as_strided(tensor.shape, tensor.stride()))
        first += _aligned(tensor.nbytes)
    return found


class CpuMemory:
    """Buffers in host memory: page-locked for a GPU, or with a warning where that is refused.

    Args:
        device:  the buffers' blocks are trained there
    """

    def __init__(self, device: torch.device):
        self._device, self._pins = device, device.type == "cuda"
        self._pinned: list[Tensor] = []
        # the list keeps them alive until then: locked pages must not be freed
        weakref.finalize(self, _unpin, self._pinned)

    def room(self, nbytes: int) -> Tensor:
        """A buffer (nbytes,) uint8 off the device, which the host can read."""
        # pages of its own: those that two buffers share could be locked for one of them alone
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        if self._pins:
            self._pins = pin(buffer, self._device)
            if self._pins:
                self._pinned.append(buffer)
            else:
                warnings.warn(
                    f"{in_words(nbytes)} of host memory cannot be page-locked: what waits in "
                    "it is pageable, so a copy takes about twice as long and none runs beside "
                    "the steps",
                    stacklevel=2,
                )
        return buffer

    def seal(self, home: Tensor, updated_bytes: int) -> None:
        """Nothing: what lies in memory is not looked after."""

    def load(self, home: Tensor, slot: Tensor) -> None:
        """Copy a buffer to as many bytes on the device, in the current stream's order."""
        slot.copy_(home, non_blocking=True)

    def store(self, slot: Tensor, home: Tensor) -> None:
        """Copy them back; the host may read them when the current stream is through."""
        home.copy_(slot, non_blocking=True)


def pin(buffer: Tensor, device: torch.device) -> bool:
    """Lock a buffer's pages for a GPU, which torch's own allocator would round up to 2**n bytes.

    Returns:
        Whether it was granted.
    """
    with torch.cuda.device(device):
        refused = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        if refused:
            # the refusal is still on record, and would be raised by the next launch of a kernel
            with suppress(RuntimeError):
                torch.zeros(1, dtype=torch.uint8, device=device)
    return not refused


def _unpin(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


class DiskMemory:
    """Buffers in files without a name, so that they are gone with the run, however it ends.

    Args:
        directory:  of the files; made where it is missing
        nbytes:     of all the buffers that will be asked for
        device:     the buffers' blocks are trained there
    Raises:
        ValueError: the directory has less room.
    """

    def __init__(self, directory: Path, nbytes: int, device: torch.device):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < nbytes:
            raise ValueError(
                f"offload_dir must have {in_words(nbytes)} free for the blocks, "
                f"got {in_words(free)} in {directory}"
            )
        self._directory = directory
        self._staging = _Staging(min(max(nbytes, ALIGNMENT), rest_file.STAGING_BYTES), device)
        self._files: dict[int, RestFile] = {}  # by the address of the buffer
        self._held: list[Held] = []

    def room(self, nbytes: int) -> Tensor:
        """As `CpuMemory.room`."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            # a hole that the disk cannot fill later would kill the process
            os.posix_fallocate(file.fileno(), 0, nbytes)
            pages = mmap.mmap(file.fileno(), nbytes)
            rest = RestFile(os.dup(file.fileno()), self._directory, self._held)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self._files[buffer.data_ptr()] = rest
        weakref.finalize(pages, _close, self._files, buffer.data_ptr())
        return buffer

    def seal(self, home: Tensor, updated_bytes: int) -> None:
        """Take what the host has written to a buffer as what it holds.

        Args:
            home:           of `room`
            updated_bytes:  that `store` will write; it never writes those after them
        """
        self._files[home.data_ptr()].seal(updated_bytes, len(home))

    def read(self, home: Tensor, first: int, nbytes: int) -> Iterator[Tensor]:
        """Bytes of a buffer, (n,) uint8 each, as they were stored.

        Raises:
            ValueError: the file was cut short or has other bytes.
        """
        return self._files[home.data_ptr()].read(first, nbytes)

    def load(self, home: Tensor, slot: Tensor) -> None:
        """As `CpuMemory.load`.

        Raises:
            ValueError: the file was cut short or has other bytes.
        """
        rest = self._files[home.data_ptr()]
        for first, nbytes in rest.pieces():
            staged = self._staging.next(nbytes)
            rest.fill(staged, first)
            slot[first : first + nbytes].copy_(staged, non_blocking=True)
            self._staging.mark()

    def store(self, slot: Tensor, home: Tensor) -> None:
        """As `CpuMemory.store`."""
        rest = self._files[home.data_ptr()]
        for first in range(0, len(slot), rest_file.STAGING_BYTES):
            source = slot[first : first + rest_file.STAGING_BYTES]
            staged = self._staging.next(len(source))
            staged.copy_(source)
            rest.write(staged, first)


OffloadMemory = CpuMemory | DiskMemory


def _close(files: dict[int, RestFile], address: int) -> None:
    files.pop(address).close()


class _Staging:
    """Two buffers between files and the device, page-locked for a GPU, used in turn."""

    def __init__(self, nbytes: int, device: torch.device):
        cuda = device.type == "cuda"
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._read = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self._turn = 0

    def next(self, nbytes: int) -> Tensor:
        """The other buffer, when the device has read what lay in it."""
        self._turn = 1 - self._turn
        if self._read:
            self._read[self._turn].synchronize()
        return self._buffers[self._turn][:nbytes]

    def mark(self) -> None:
        """Say that the current stream reads the buffer until here."""
        if self._read:
            self._read[self._turn].record()
