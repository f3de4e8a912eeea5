import pickle

import pytest
from torch.cuda import _memory_viz

from dbkernels.memory.predict import predict
from dbkernels.memory.timeline import BASE, snapshot, write_timeline
from dbkernels.memory.trace import CATEGORIES, START, Event, Trace
from dbkernels.memory.workspace import TARGETS, MiB

PARAMETERS, TEMPORARIES = CATEGORIES.index("parameters"), CATEGORIES.index("temporaries")


def prediction(target="h100"):
    events = [
        Event(START, 0, 4 * MiB),
        Event(0, 1, 30 * MiB),
        Event(1, 1, -30 * MiB),
        Event(1, 2, 600),
    ]
    ops = ["forward: aten::a", "backward: aten::b"]
    return predict(Trace(ops, events, [PARAMETERS, TEMPORARIES, TEMPORARIES]), TARGETS[target])


def live(entries):
    """Bytes that are alive after each entry, checked against blocks that are freed."""
    alive, levels = {}, []
    for entry in entries:
        if entry["action"] == "alloc":
            assert entry["addr"] not in alive
            alive[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            assert alive.pop(entry["addr"]) == entry["size"]
        levels.append(sum(alive.values()))
    return levels


def test_the_timeline_rises_to_the_predicted_peak():
    expected, (entries,) = prediction(), snapshot(prediction())["device_traces"]
    assert max(live(entries)) == expected.peak_allocated_bytes
    segments = sum(e["size"] for e in entries if e["action"] == "segment_alloc")
    assert segments == expected.peak_reserved_bytes


def test_every_block_lies_in_a_segment_that_was_taken_before():
    taken = []
    for entry in snapshot(prediction())["device_traces"][0]:
        first, end = entry["addr"], entry["addr"] + entry["size"]
        if entry["action"] == "segment_alloc":
            taken.append((first, end))
        assert first >= BASE and any(a <= first and end <= b for a, b in taken)


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
