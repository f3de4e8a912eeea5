"""Tensors to a safetensors file, in pieces: memory for one of them, and their hash beside it.

    <u64: bytes of the header> <header: JSON> <tensors, one after another>

https://github.com/huggingface/safetensors. The library's own writer wants every tensor in host
memory and a copy of each that shares its storage, and the file has to be read again to be hashed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

PIECE_BYTES = 2**23  # read, checked, hashed and written at a time
ALIGNMENT = 8  # of the tensors in the file, in bytes
# safetensors also writes dtypes that it cannot read back
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Pieces = Iterable[Tensor]  # (n,) uint8 of the host, one after another
Read = Callable[[Tensor], Pieces]  # a tensor's elements in order, as bytes


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in order, as bytes of the host.

    Args:
        tensor:  dense, of any device and strides
    Returns:
        (n,) uint8 each, of a tensor that is contiguous without a copy of all of it.
    """
    flat = tensor.detach().resolve_neg().contiguous().view(-1)
    for piece in flat.view(torch.uint8).split(PIECE_BYTES):
        yield piece.cpu()


def write_tensors(
    file: BinaryIO, named: Mapping[str, Tensor], *, read: Read = pieces, finite: bool = False
) -> tuple[int, str]:
    """Write tensors to a file that is empty.

    Args:
        file:    to write to
        named:   dense tensors of DTYPES by name
        read:    gives the bytes of each
        finite:  whether a number that is not is refused
    Returns:
        The file's bytes, and their sha256.
    Raises:
        FloatingPointError: a number is not finite.
    """
    digest, size = hashlib.sha256(), 0

    def write(data: bytes | memoryview) -> None:
        nonlocal size
        file.write(data)
        digest.update(data)
        size += len(data)

    # in their order but for the size of an element, so that each lies where its dtype may
    ordered = dict(sorted(named.items(), key=lambda item: -item[1].element_size()))
    write(_header(ordered))
    for name, tensor in ordered.items():
        for piece in read(tensor):
            if finite and tensor.is_floating_point() and not _is_finite(piece, tensor.dtype):
                raise FloatingPointError(
                    f"weights must be finite to be saved, got others in {name}"
                )
            write(piece.numpy().data)
    return size, digest.hexdigest()


def _header(named: Mapping[str, Tensor]) -> bytes:
    entries, first = {}, 0
    for name, tensor in named.items():
        last = first + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, last],
        }
        first = last
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _is_finite(piece: Tensor, dtype: torch.dtype) -> bool:
    numbers = piece.view(dtype)
    # 8 bits have no comparison of their own
    return bool((numbers if dtype.itemsize > 1 else numbers.float()).isfinite().all())
