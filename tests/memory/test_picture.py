import sys

import pytest
from matplotlib.image import imread

from dbkernels.memory.picture import COLOURS, draw
from dbkernels.memory.predict import predict
from dbkernels.memory.trace import CATEGORIES, START, Event, Trace
from dbkernels.memory.workspace import TARGETS

GiB = 2**30
SAVED, PARAMETERS = CATEGORIES.index("saved_activations"), CATEGORIES.index("parameters")


def prediction():
    events = [Event(START, 0, 2 * GiB)]
    events += [Event(op, 1 + op, GiB) for op in range(10)]
    events += [Event(10 + op, 1 + op, -GiB) for op in range(10)]
    ops = ["forward: aten::a"] * 10 + ["backward: aten::b"] * 9 + ["optimizer: aten::c"]
    return predict(Trace(ops, events, [PARAMETERS] + [SAVED] * 10), TARGETS["cpu"])


def test_every_category_has_a_colour_of_its_own():
    assert set(COLOURS) == set(CATEGORIES) and len(set(COLOURS.values())) == len(CATEGORIES)


def test_saved_activations_rise_and_fall(tmp_path):
    draw(tmp_path / "step.png", prediction(), title="a step")
    image = imread(tmp_path / "step.png")[..., :3]
    red, green, blue = (int(COLOURS["saved_activations"][i : i + 2], 16) / 255 for i in (1, 3, 5))
    saved = (abs(image - [red, green, blue]) < 0.01).all(-1)
    heights = saved.sum(0)[: int(0.7 * saved.shape[1])]  # without the legend
    top = heights.argmax()
    assert heights.max() > 0.3 * len(image)
    assert heights[top // 2] < heights.max() / 2 + 1
    assert 0.2 < top / saved.shape[1] < 0.6


def test_says_the_peak_its_op_and_the_phases(tmp_path):
    draw(tmp_path / "step.svg", prediction(), title="a step of a net")
    text = (tmp_path / "step.svg").read_text()
    for words in ("a step of a net", "12.00 GiB", "forward: aten::a", "backward", "update"):
        assert f"<!-- {words}" in text or f"{words} -->" in text


def test_needs_matplotlib_and_a_known_format(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        draw(tmp_path / "step.xyz", prediction())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib must be installed .*dbkernels\[demo\]"):
        draw(tmp_path / "step.png", prediction())
