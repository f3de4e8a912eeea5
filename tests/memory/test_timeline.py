import pickle
import sys

import pytest
from matplotlib.image import imread
from torch.cuda import _memory_viz

from dbkernels.memory.allocator import TARGETS, MiB
from dbkernels.memory.measure import predict
from dbkernels.memory.timeline import BASE, COLOURS, draw, levels, snapshot, write_timeline
from dbkernels.memory.tracker import CATEGORIES, START, Event, Trace

GiB = 2**30


def hill(unit=10):
    """Parameters of ten units; four ops keep one each and four let go; the last two do both."""
    names = ["forward: a"] * 3 + ["forward: idle"] + ["forward: a"] + ["backward: b"] * 4
    names += ["backward: norm", "optimizer: c", "c"]
    events = [Event(START, 0, 10 * unit)]
    events += [Event(op, 1 + i, unit) for i, op in enumerate((0, 1, 2, 4))]
    events += [Event(op, 1 + i, -unit) for i, op in enumerate((5, 6, 7, 8))]
    for i, op in enumerate((10, 11)):
        events += [Event(op, 5 + i, 7), Event(op, 5 + i, -7)]
    categories = ["parameters"] + ["saved_activations"] * 6
    return predict(Trace(names, events, categories), TARGETS["cpu"])


# in few numbers


def test_each_op_that_changes_something_has_its_highest_moment():
    found = levels(hill(), parts=100)
    assert found.starts == list(range(11))
    assert found.by_category["parameters"] == [100] * 11
    assert found.by_category["saved_activations"] == [0, 10, 20, 30, 40, 30, 20, 10, 0, 7, 7]
    assert set(found.by_category) == set(CATEGORIES)
    assert found.totals == [100, 110, 120, 130, 140, 130, 120, 110, 100, 107, 107]
    # what follows the backward is the update
    assert found.phases == [("forward", 1), ("backward", 5), ("update", 9)]


@pytest.mark.parametrize(
    "parts, starts, totals",
    [
        (1, [0], [140]),
        (2, [0, 5], [140, 130]),
        (3, [0, 3, 7], [120, 140, 110]),
        (5, [0, 2, 4, 6, 8], [110, 130, 140, 120, 107]),
    ],
)
def test_parts_are_equal_and_each_is_at_its_highest(parts, starts, totals):
    found = levels(hill(), parts=parts)
    assert (found.starts, found.totals) == (starts, totals)
    assert found.phases == levels(hill(), parts=100).phases


def test_on_a_gpu_the_allocators_blocks_count():
    events = [Event(START, 0, 1), Event(0, 1, 513), Event(1, 1, -513)]
    trace = Trace(["forward: a", "backward: b"], events, ["parameters", "saved_activations"])
    found = levels(predict(trace, TARGETS["h100"]), parts=9)
    assert found.by_category["parameters"] == [512] * 3
    assert found.by_category["saved_activations"] == [0, 1024, 0]


def test_there_is_a_part():
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        levels(hill(), parts=0)


# a picture


def test_saved_activations_rise_and_fall_in_a_colour_of_their_own(tmp_path):
    assert set(COLOURS) == set(CATEGORIES) and len(set(COLOURS.values())) == len(CATEGORIES)
    draw(tmp_path / "step.png", hill(GiB), title="a step")
    image = imread(tmp_path / "step.png")[..., :3]
    red, green, blue = (int(COLOURS["saved_activations"][i : i + 2], 16) / 255 for i in (1, 3, 5))
    saved = (abs(image - [red, green, blue]) < 0.01).all(-1)
    heights = saved.sum(0)[: int(0.7 * saved.shape[1])]  # without the legend
    top = heights.argmax()
    assert heights.max() > 0.15 * len(image)
    assert heights[top // 2] < heights.max() / 2 + 1
    assert 0.2 < top / saved.shape[1] < 0.6


def test_says_the_peak_its_op_and_the_phases(tmp_path):
    draw(tmp_path / "step.svg", hill(GiB), title="a step of a net")
    text = (tmp_path / "step.svg").read_text()
    for words in ("a step of a net", "14.00 GiB, forward: a", "forward", "backward", "update"):
        assert f"<!-- {words} -->" in text


def test_needs_matplotlib_and_a_known_format(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        draw(tmp_path / "step.xyz", hill())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib must be installed .*dbkernels\[demo\]"):
        draw(tmp_path / "step.png", hill())


# a snapshot


def prediction(target="h100"):
    changes = [(START, 0, 4 * MiB), (0, 1, 30 * MiB), (1, 1, -30 * MiB), (1, 2, 600)]
    ops = ["forward: aten::a", "backward: aten::b"]
    categories = ["parameters", "temporaries", "temporaries"]
    return predict(Trace(ops, [Event(*each) for each in changes], categories), TARGETS[target])


def test_blocks_rise_to_the_predicted_peak_in_segments_that_were_taken_before():
    taken, alive, totals = [], {}, []
    for entry in snapshot(prediction())["device_traces"][0]:
        first, end = entry["addr"], entry["addr"] + entry["size"]
        if entry["action"] == "segment_alloc":
            taken.append((first, end))
        elif entry["action"] == "alloc":
            assert first not in alive
            alive[first] = entry["size"]
        elif entry["action"] == "free_completed":
            assert alive.pop(first) == entry["size"]
        totals.append(sum(alive.values()))
        assert first >= BASE and any(a <= first and end <= b for a, b in taken)
    assert max(totals) == prediction().peak_allocated_bytes
    assert sum(end - first for first, end in taken) == prediction().peak_reserved_bytes


def test_blocks_say_what_made_them_and_what_they_were_for():
    entries = snapshot(prediction())["device_traces"][0]
    (allocation, *_) = [e for e in entries if e["action"] == "alloc" and e["size"] == 30 * MiB]
    op, category = allocation["frames"]
    assert (op["filename"], op["name"], op["line"]) == ("forward", "aten::a", 0)
    assert category["name"] == "temporaries"
    (start,) = [e for e in entries if e["action"] == "alloc" and e["size"] == 4 * MiB]
    assert [frame["name"] for frame in start["frames"]] == ["start", "parameters"]


def test_segments_are_full_of_blocks_and_what_is_free():
    segments = snapshot(prediction())["segments"]
    for segment in segments:
        end = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == end
            end += block["size"]
        assert end == segment["address"] + segment["total_size"]
        active = [b["size"] for b in segment["blocks"] if b["state"] == "active_allocated"]
        assert segment["allocated_size"] == segment["active_size"] == sum(active)
    # at the end: parameters, 600 bytes in two blocks of 512, and workspaces
    assert sum(s["allocated_size"] for s in segments) == 4 * MiB + 1024 + 2 * (32 + 1) * MiB
    assert {s["segment_type"] for s in segments if s["total_size"] == 2 * MiB} == {"small"}


@pytest.mark.parametrize("target", ["h100", "cpu"])
def test_pytorchs_memory_viewer_opens_the_file(target, tmp_path):
    write_timeline(tmp_path / "step.pickle", prediction(target))
    data = pickle.loads((tmp_path / "step.pickle").read_bytes())
    assert "30.0MiB" in _memory_viz.segsum(data)
    assert "cudaMalloc" in _memory_viz.trace(data)
    assert "MemoryViz.js" in _memory_viz.trace_plot(data)
    assert "MemoryViz.js" in _memory_viz.segment_plot(data)
