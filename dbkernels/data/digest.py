"""A digest of a data set, by which a run knows its data again wherever they lie."""

import hashlib
import json
from pathlib import Path

import numpy as np

from dbkernels.data.images import ImageData

WHOLE_BYTES = 2**26  # data sets of up to so many bytes are read whole, of larger ones as many
PIECE = 256  # images read at a time


def digest(data: ImageData) -> str:
    """Digest of the samples in their order: what they are, all labels, and the images' bytes.

    Image files count with their class folder, name and size, all of them, and with the bytes of
    evenly spaced ones, so many that WHOLE_BYTES are read; all of them where they have no more.
    Arrays count with their shape and dtype, and the bytes of images in the same way.

    Returns:
        16 hexadecimal digits.
    Raises:
        ValueError: an image cannot be read.
        OSError: a file cannot be.
    """
    found = hashlib.sha256()
    images, labels = data.images, data.labels.numpy()
    head = [list(images.shape), str(images.dtype), data.num_classes]
    sources = getattr(images, "sources", [])
    if len(sources) and isinstance(sources[0], Path):
        sizes = [path.stat().st_size for path in sources]
        head += [[*path.parts[-2:], size] for path, size in zip(sources, sizes, strict=True)]
        for row in _spaced(len(sources), sum(sizes)):
            found.update(sources[row].read_bytes())
    else:
        rows = _spaced(len(data), int(np.prod(images.shape)) * images.dtype.itemsize)
        for first in range(0, len(rows), PIECE):
            found.update(np.ascontiguousarray(images[rows[first : first + PIECE]]).data)
    found.update(json.dumps(head).encode())
    found.update(np.ascontiguousarray(labels).data)
    return found.hexdigest()[:16]


def _spaced(count: int, nbytes: int) -> np.ndarray:
    """Evenly spaced of some samples of so many bytes: all, or those that have WHOLE_BYTES."""
    kept = min(count, max(1, count * WHOLE_BYTES // max(nbytes, 1)))
    return np.arange(kept) * count // kept
