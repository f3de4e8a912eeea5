"""The layouts of data that the page names are those that are read."""

import math
import pickle
import re
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbkernels.data.captions import open_captions
from dbkernels.data.formats import MissingSplit
from dbkernels.data.images import open_data

PAGE = (Path(__file__).parents[2] / "docs/command_line.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE[PAGE.index("| source |") :].partition("\n\n")[0].splitlines()[2:]
]


def write(root, name):
    """A file of the layout, by its name on the page."""
    path = root / name.replace("NAME", "mine").replace("CLASS", "cat").replace("*", "0")
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".png":
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        case ".npy":
            shapes = {"text": (4, 3, 5), "pooled": (4, 2)}
            shape = next((shapes[end] for end in shapes if end in name), (4, 4, 8, 8))
            labels = "labels" in name
            np.save(path, np.arange(4) % 2 if labels else np.zeros(shape, np.float32))
        case ".bin":
            names = ("train.bin", "test.bin")
            path.write_bytes(bytes(4 * (3072 + (2 if path.name in names else 1))))
        case "" if "batch" in name or name in ("train", "test"):
            labels = b"labels" if "batch" in name else b"fine_labels"
            pixels = np.zeros((4, 3072), np.uint8)
            path.write_bytes(pickle.dumps({b"data": pixels, labels: [0, 1, 0, 1]}))
        case "" if path.name.endswith("-ubyte"):
            sizes = (4, 8, 8) if "idx3" in name else (4,)
            head = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
            path.write_bytes(head + bytes(math.prod(sizes)))


def all_of(cell):
    """The names of a cell; `x1` to `x5` are five."""
    names = re.findall(r"`([^`]+)`", cell)
    if " to " in cell:
        first, last = (int(re.search(r"\d+", name)[0]) for name in names)
        return [re.sub(r"\d+", str(number), names[0]) for number in range(first, last + 1)]
    return names


def test_the_table_has_every_source():
    assert len(ROWS) == 12 and [row[2] for row in ROWS].count("none") == 1


# what a package installs elsewhere has a test beside the format that it has
@pytest.mark.parametrize("row", [r for r in ROWS if r[0] != "`fashion`"], ids=lambda row: row[0])
def test_a_layout_of_the_page_is_read(tmp_path, row):
    source, train, test = row
    read = open_captions if "mmdit" in source else open_data
    names = {"train": all_of(train), "test": all_of(test)}
    if "npz" in source:
        arrays = {name: np.zeros((4, 1, 8, 8), np.uint8) for name in chain(*names.values())}
        arrays |= {name: np.arange(4) % 2 for name in arrays if "labels" in name}
        np.savez(tmp_path / "mine.npz", **arrays)
    # of two names for a test split, either does
    for either in names["test"] if " or " in test else [None]:
        root = tmp_path / (either or "").partition("/")[0]
        for name in [*names["train"], *([either] if either else names["test"])]:
            write(root, name)
        place = source.strip("`").partition("`")[0].replace("NAME", "mine")
        found = "digits" if place == "digits" else root / place if "mine" in place else root
        assert len(read(found)) > 0
        if test == "none":
            with pytest.raises(MissingSplit):
                read(found, "test")
        else:
            assert len(read(found, "test")) > 0
