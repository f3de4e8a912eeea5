"""A digest of a data set, by which a run knows its data again wherever they lie."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dbkernels.data.captions import CaptionedImages
from dbkernels.data.formats import Images
from dbkernels.data.images import ImageData
from dbkernels.data.rows import spaced
from dbkernels.data.tokens import TokenData, pieces

WHOLE_BYTES = 2**26  # data sets of up to so many bytes are read whole, of larger ones as many
PIECE = 256  # images read at a time


def digest(data: ImageData | CaptionedImages | TokenData) -> str:
    """Digest of the samples in their order: what they are, and their bytes.

    Image files count with their class folder, name and size, all of them, and with the bytes of
    evenly spaced ones, so many that WHOLE_BYTES are read; all of them where they have no more.
    Arrays count with their shape and dtype, and the bytes of images in the same way. All labels
    count. Tokens count with their vocabulary, the places of all windows, and the bytes of the file
    in the same way.

    Returns:
        16 hexadecimal digits.
    Raises:
        ValueError: an image or a file of tokens cannot be read.
        OSError: a file cannot be.
    """
    kinds = {TokenData: _of_tokens, CaptionedImages: _of_captions}
    parts = kinds.get(type(data), _of_images)(data)
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def _of_images(data: ImageData) -> Iterator[bytes | memoryview]:
    images, labels = data.images, data.labels.numpy()
    head = [list(images.shape), str(images.dtype), data.num_classes]
    sources = getattr(images, "sources", [])
    if len(sources) and isinstance(sources[0], Path):
        sizes = [path.stat().st_size for path in sources]
        head += [[*path.parts[-2:], size] for path, size in zip(sources, sizes, strict=True)]
        for row in spaced(len(sources), _within(len(sources), sum(sizes))):
            yield sources[row].read_bytes()
    else:
        yield from _of_rows(images)
    yield json.dumps(head).encode()
    yield np.ascontiguousarray(labels).data


def _of_captions(data: CaptionedImages) -> Iterator[bytes | memoryview]:
    for name, array in data.arrays().items():
        yield from _of_rows(array)
        yield json.dumps([name, list(array.shape), str(array.dtype)]).encode()


def _of_rows(array: Images) -> Iterator[memoryview]:
    """Bytes of evenly spaced rows."""
    nbytes = int(np.prod(array.shape)) * array.dtype.itemsize
    rows = spaced(array.shape[0], _within(array.shape[0], nbytes))
    for first in range(0, len(rows), PIECE):
        yield np.ascontiguousarray(array[rows[first : first + PIECE]]).data


def _of_tokens(data: TokenData) -> Iterator[bytes | memoryview]:
    tokens, windows = data.tokens, data.windows
    for _, piece in pieces(tokens, WHOLE_BYTES // tokens.dtype.itemsize):
        yield piece.data
    head = [len(tokens), str(tokens.dtype), data.vocabulary, windows.length, windows.stride]
    yield json.dumps(head).encode()
    yield windows.ends.data


def _within(count: int, nbytes: int) -> int:
    """How many of some samples of so many bytes have WHOLE_BYTES; one at least."""
    return max(1, count * WHOLE_BYTES // max(nbytes, 1))
