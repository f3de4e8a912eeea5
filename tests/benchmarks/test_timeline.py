import json
import sys
from dataclasses import replace

import pytest
import torch

from dbkernels.memory.tracker import CATEGORIES
from dbkernels.models import vit

SMALL = {"family": "vit", "preset": "tiny", "device": "cpu", "batch": 4, "num_blocks": 2}


@pytest.fixture(scope="module")
def timeline(bench):
    """`benchmarks/timeline.py`, with a preset of 4 layers."""
    tiny = replace(vit.PRESETS["digits"], dim=16, depth=4, num_heads=2, mlp_hidden=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.PRESETS, "tiny", tiny)
        yield bench("timeline")


@pytest.fixture(scope="module")
def rows(timeline):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/timeline.py", "--json", "--family", "vit"])
        return list(timeline.rows_of(timeline.Options(**SMALL)))


def test_rows_have_what_a_report_draws(rows, tmp_path, monkeypatch, bench):
    monkeypatch.syspath_prepend(str(bench("machine").ROOT / "tools"))
    path = tmp_path / "timeline.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = bench("report_rows").read([path])
    assert read == json.loads(json.dumps(rows))
    assert [(row["method"], row["num_blocks"], row["offload"]) for row in rows] == [
        ("end_to_end", 1, "none"),
        ("checkpointed", 1, "none"),
        ("block_fused", 2, "cpu"),
    ]


def test_rows_say_where_they_come_from_and_that_nothing_ran(rows):
    for row in rows:
        assert (row["device"], row["driver"], row["memory"]) == ("H100", None, "predicted")
        assert row["command"] == "python benchmarks/timeline.py --family vit"
        assert row["torch"] == torch.__version__ and "commit" in row
        assert row["implementation"] == ("triton" if row["recompute"] else "torch")


def test_the_levels_reach_the_peak(rows, timeline):
    for row in rows:
        assert set(row["levels"]) == set(row["by_category"]) == set(CATEGORIES)
        totals = [sum(part) for part in zip(*row["levels"].values(), strict=True)]
        assert max(totals) == row["peak_allocated_bytes"]
        assert len(totals) == len(row["starts"]) <= timeline.PARTS
        assert [name for name, _ in row["phases"]][:2] == ["forward", "backward"]
        assert row["at"].partition(":")[0] in ("forward", "backward", "optimizer")
    whole, _, block = (row["levels"]["optimizer"][0] for row in rows)
    # half of the layers, and what every block has
    assert 0.4 * whole < block < 0.7 * whole


def test_one_way_has_what_it_is_told(timeline):
    options = timeline.Options(
        **SMALL, methods=("block_fused",), recompute="qkv", offload="none", target="a100"
    )
    (row,) = timeline.rows_of(options)
    assert (row["recompute"], row["offload"], row["device"]) == ("qkv", "none", "A100")


def test_a_gpu_that_is_here_is_predicted_under_its_own_name(timeline, monkeypatch):
    options, asked = timeline.Options(**SMALL), []
    monkeypatch.setattr(timeline, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(timeline, "target_of", lambda device: asked.append(device) or "this")
    assert options.target_and_name() == ("this", {})
    assert asked == [torch.device("cuda")]


def test_the_table_can_be_read(timeline, rows, bench, capsys):
    bench("show").show(rows)
    shown = " ".join(capsys.readouterr().out.split())
    assert "vit tiny, batch 4, bfloat16 compute, H100" in shown
    assert "predicted without running for H100" in shown
    assert "printed by python benchmarks/timeline.py --family vit" in shown
    assert "fused layer offload cpu" in shown and "backward: " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, autocast, got float16"),
        ({"recompute": "all"}, "recompute must be one of none, attention, .*, got all"),
        ({"offload": "some"}, "offload must be one of none, cpu, got some"),
        ({"methods": ("fused",)}, "methods must be of end_to_end, .*, got fused"),
        ({"budget": 2.0}, "budget must be from 0 to 1, got 2.0"),
        ({"num_blocks": 13}, "num_blocks must be from 1 to the 12 layers of S/2, got 13"),
        ({"preset": "huge"}, "preset of dit must be one of .*, got huge"),
        ({"target": "v100"}, "target must be one of .*, got v100"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_refuses_options_in_a_sentence(timeline, options, message):
    with pytest.raises(ValueError, match=message):
        timeline.Options(**{"preset": "S/2"} | options)
