import base64
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MIB = 2**20
TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def tool():
    """Import one of the report's files, which stand beside each other and are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module


@pytest.mark.parametrize(("level", "block"), [(80, 0), (0.31, 0), (0.3, 1), (0.1, 1), (0.002, 1)])
def test_a_level_belongs_to_the_block_below_whose_top_it_lies(tool, level, block):
    blocks = [{"index": 0, "low": 0.3, "high": 80.0}, {"index": 1, "low": 0.002, "high": 0.3}]
    for order in (blocks, blocks[::-1]):
        assert tool("demo_figures").serving_block({"blocks": order}, level) == block


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1.5 * MIB, "1.5 MiB"),
     (1000 * MIB, "1000 MiB"), (2**30, "1 GiB"), (2**45, "32 TiB"), (2**55, "32768 TiB")],
)  # fmt: skip
def test_bytes_have_binary_units(tool, count, text):
    assert tool("demo_drawing").bytes_text(count) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [([3], "layer 3"), ([0, 1, 2], "layers 0–2"), ([0, 2], "layers 0, 2"), ([1, 1], "layers 1, 1")],
)
def test_layers_are_named(tool, layers, text):
    assert tool("demo_drawing").layers_text({"layers": layers}) == text


def test_digits_keep_their_pixels_and_their_row(tool):
    figures = tool("demo_figures")
    first, second = np.arange(6).reshape(2, 3) * 50, np.full((2, 3), 255)
    uri = figures.digits_png([[first.tolist(), second.tolist()], [second.tolist()]])
    file = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
    grid = np.asarray(Image.open(file).convert("L"))
    assert grid.shape == (2 * 3 + 1, 2 * 4 + 1)
    assert np.array_equal(grid[1:3, 1:4], first)
    assert np.array_equal(grid[1:3, 5:8], second) and np.array_equal(grid[4:6, 1:4], second)
    assert (grid[4:6, 5:8] == figures.GRID_SHADE).all() and (grid[0] == figures.GRID_SHADE).all()
