import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from dbkernels.models import vit

ROWS = {"commit", "command", "copy_gbps", "matmul_tflops", "share_of_matmul_rate", "flops"}
SMALL = {"family": "vit", "preset": ("tiny",), "device": "cpu", "threads": 1, "batch": 4}


@pytest.fixture(scope="module")
def training(bench):
    """`benchmarks/training.py`, with a preset of 5 layers."""
    tiny = replace(vit.PRESETS["digits"], dim=16, depth=5, num_heads=2, mlp_hidden=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.PRESETS, "tiny", tiny)
        patch.setattr(bench("machine"), "COPY_BYTES", 2**16)
        patch.setattr(bench("machine"), "MATMUL", {"cpu": 64})
        patch.setattr(bench("measure"), "WARM_UP_MS", {"cpu": 0})
        yield bench("training")


@pytest.fixture(scope="module")
def rows(training):
    """Of every method that compiles nothing."""
    methods = tuple(method for method in training.METHODS if method != "compiled")
    options = training.Options(
        **SMALL, methods=methods, num_blocks=(1, 2), recompute=("none", "layer"), rounds=4
    )
    return rows_by(training, options)


def rows_by(training, options, ready=None, failed=()):
    """All rows of the options' one case."""
    (case,) = options.cases()
    return list(training.rows_of(case, options, ready, list(failed)))


def test_rows_have_what_a_report_reads(rows, tmp_path, monkeypatch, bench):
    monkeypatch.syspath_prepend(str(bench("machine").ROOT / "tools"))
    path = tmp_path / "training.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = bench("report_rows").read([path])
    assert [{**row} for row in read] == json.loads(json.dumps(rows))
    for row in rows:
        assert row.keys() >= ROWS
        assert (row["suite"], row["memory"], row["offload"]) == ("training", "measured", "none")
        assert 0 < row["p20_ms"] <= row["step_ms"] <= row["p80_ms"]
        assert row["sweep_ms"] == pytest.approx(row["num_blocks"] * row["step_ms"])
        assert row["samples_per_second"] == pytest.approx(4e3 / row["step_ms"])
        assert row["achieved_tflops"] == pytest.approx(row["flops"] / row["step_ms"] / 1e9)


def test_a_row_tells_what_its_way_keeps(rows):
    saved = {(r["method"], r["num_blocks"], r["recompute"]): r["saved_bytes"] for r in rows}
    whole = saved["end_to_end", 1, None]
    assert saved["checkpointed", 1, None] < saved["selective", 1, None] < whole
    # of 5 layers the larger block has 3
    assert 0.55 * whole < saved["block_stock", 2, None] < 0.7 * whole
    for count in (1, 2):
        layer, none = (saved["block_fused", count, recompute] for recompute in ("layer", "none"))
        assert layer < none < (saved["block_stock", 2, None] if count == 2 else whole)


def test_a_peak_is_what_its_categories_add_up_to(rows):
    for row in rows:
        parts = row["by_category"]
        assert row["peak_allocated_bytes"] == pytest.approx(sum(parts.values()), rel=0.02)
        # AdamW has two moments of each parameter
        assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
        assert row["saved_bytes"] < row["peak_allocated_bytes"]


def test_operations_are_averaged_over_blocks_that_differ(rows):
    flops = {(r["method"], r["num_blocks"], r["recompute"]): r["flops"] for r in rows}
    whole, half = flops["end_to_end", 1, None], flops["block_stock", 2, None]
    # the stem and the head are in every step, and in 4 samples of 17 tokens weigh little
    assert whole / 2 <= half < 0.55 * whole
    # a fused ViT computes of its last layer what it reads
    assert flops["block_fused", 1, "none"] < whole < flops["checkpointed", 1, None]


def test_a_gpu_that_is_not_there_is_predicted(training):
    methods = ("checkpointed", "end_to_end")
    options = training.Options(**SMALL, target="h100", num_blocks=(1,), methods=methods)
    for method in options.methods:
        row, less = (
            rows_by(training, replace(options, methods=(method,), optimizer_in_backward=(each,)))[0]
            for each in (False, True)
        )
        assert (row["optimizer_in_backward"], less["optimizer_in_backward"]) == (False, True)
        assert less["peak_allocated_bytes"] < row["peak_allocated_bytes"]
        assert (row["device"], row["driver"], row["memory"]) == ("H100", None, "predicted")
        assert row["step_ms"] is row["copy_gbps"] is row["share_of_matmul_rate"] is None
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > 0
        assert sum(row["by_category"].values()) == row["peak_allocated_bytes"]


def test_one_dry_run_tells_what_all_blocks_need_and_what_one_needs(training, bench):
    options = training.Options(
        **SMALL,
        target="h100",
        methods=("block_fused",),
        num_blocks=(2,),
        recompute=("qkv",),
        optimizer_in_backward=(False,),
    )
    rows = rows_by(training, options)
    assert [row["offload"] for row in rows] == ["none", "cpu"]
    assert rows[0]["peak_allocated_bytes"] > rows[1]["peak_allocated_bytes"]
    assert rows[0]["saved_bytes"] == rows[1]["saved_bytes"]


def test_what_does_not_fit_is_predicted_and_said(training, bench, monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bench("training_rows"), "weigh", out_of_memory)
    options = training.Options(
        **SMALL, methods=("end_to_end",), num_blocks=(1,), optimizer_in_backward=(False,), rounds=2
    )
    (row,) = rows_by(training, options)
    assert row["memory"] == "predicted" and row["step_ms"] is None
    assert "end to end in 1 block does not fit the device" in capsys.readouterr().err


def test_a_way_that_fails_is_named_and_the_others_are_there(training, bench, monkeypatch, capsys):
    rows_module = bench("training_rows")
    weigh = rows_module.weigh

    def broken(case, way, *more):
        if way.method == "checkpointed":
            raise RuntimeError("an illegal address")
        return weigh(case, way, *more)

    monkeypatch.setattr(rows_module, "weigh", broken)
    methods = ("end_to_end", "checkpointed", "selective")
    options = training.Options(
        **SMALL, methods=methods, num_blocks=(1,), optimizer_in_backward=(False,), rounds=2
    )
    with pytest.raises(SystemExit, match="failed: tiny, checkpointed in 1 block"):
        training.main(replace(options, json=True))
    printed = capsys.readouterr()
    assert [json.loads(r)["method"] for r in printed.out.splitlines()] == [methods[0], methods[2]]
    assert "an illegal address" in printed.err


def test_a_row_without_times_comes_as_soon_as_its_way_is_weighed(training):
    options = training.Options(
        **SMALL, methods=("end_to_end",), num_blocks=(1,), optimizer_in_backward=(False,), rounds=2
    )
    first, second = rows_by(training, replace(options, early=True, json=True))
    assert first["step_ms"] is None and second["step_ms"] > 0
    assert first["peak_allocated_bytes"] == second["peak_allocated_bytes"]
    assert len(rows_by(training, replace(options, early=True))) == 1


PEAKS = {0.9: 30, 0.6: 25, 0.5: 11, 0.4: 9, 0.3: 5, 0.2: 2}  # by budget


class Known:
    """Predictions that are there: of each budget its own, and of the rest 10.5."""

    def figures(self, case, way):
        peak = PEAKS.get(way.budget, 10.5)
        return {"peak_allocated_bytes": peak, "peak_reserved_bytes": 2 * peak, "flops": 1}


def test_the_budget_is_the_one_whose_peak_is_nearest(training, bench, monkeypatch):
    prepare = bench("training_prepare")
    assert PEAKS.keys() == set(prepare.BUDGETS)
    monkeypatch.setattr(prepare.Preparation, "figures", Known.figures)
    monkeypatch.setattr(prepare.Preparation, "predict", lambda *_: None)
    way = prepare.Preparation(None, torch.device("cpu")).nearest(None, "none")
    assert (way.method, way.budget) == ("compiled", 0.5)


@pytest.fixture
def unready(bench):
    """A preparation whose processes die with their first task."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os._exit, 1).exception()
        yield bench("training_prepare").Preparation(pool, torch.device("cpu"))


def test_without_predictions_ways_are_measured_all_the_same(training, unready, capfd):
    options = training.Options(
        **SMALL, methods=("end_to_end",), num_blocks=(1,), optimizer_in_backward=(False,), rounds=2,
        beside=True, nearest="none",
    )  # fmt: skip
    (case,) = options.cases()
    unready.compile(case, options.ways(case))
    unready.predict(case, options.ways(case))
    (row,) = rows_by(training, options, unready)
    assert row["memory"] == "measured" and row["step_ms"] > 0
    assert row["predicted_peak_allocated_bytes"] is None
    told = capfd.readouterr().err
    assert "end to end in 1 block was not predicted: BrokenProcessPool" in told
    assert "was not compiled beside: BrokenProcessPool" in told


def test_what_is_waited_for_first_is_predicted_first(training, bench, monkeypatch):
    asked = []
    ready = bench("training_prepare").Preparation(None, torch.device("cpu"))
    monkeypatch.setattr(ready, "_submit", lambda f, *rest: asked.append((f.__name__, rest)))
    monkeypatch.setattr(training, "emit", lambda *_, **__: None)
    options = training.Options(**SMALL, num_blocks=(1, 2), beside=True, nearest="none")
    training.run(options, ready)
    ways = [rest[-1] for name, rest in asked if name == "figures_of"]
    known = bench("training_prepare").candidates("none")
    assert ways[: len(known)] == known and len(ways) == len(set(ways))


def test_what_was_predicted_stands_beside_and_nothing_runs_while_steps_are_timed(
    training, bench, monkeypatch
):
    told = []

    class Ready(Known):
        def wait(self):
            told.append("rests")

    samples = bench("measure").samples
    monkeypatch.setattr(
        bench("measure"), "samples", lambda *a, **k: told.append("times") or samples(*a, **k)
    )
    options = training.Options(
        **SMALL, methods=("end_to_end",), num_blocks=(1,), optimizer_in_backward=(False,), rounds=2
    )
    (row,) = rows_by(training, options, Ready())
    assert row["predicted_peak_allocated_bytes"] == 10.5
    assert row["predicted_peak_reserved_bytes"] == 21
    assert "rests" in told and told.index("rests") < told.index("times")


def test_a_rehearsal_runs_what_a_gpu_alone_measures(training, bench):
    options = training.Options(
        **SMALL | {"family": "dit", "preset": ("rehearsal",), "batch": 2},
        methods=("block_fused", "compiled"),
        num_blocks=(1, 3),
        recompute=("none", "layer"),
        budgets=(1.0,),
        offload=("none", "cpu"),
        offload_at=(3,),
        optimizer_in_backward=(False,),
        rounds=6,
        rehearse=True,
    )
    with bench("rehearsal").rehearsing(True):
        rows = rows_by(training, options)
    ways = [(row["method"], row["num_blocks"], row["recompute"], row["offload"]) for row in rows]
    assert ways.count(("block_fused", 3, "layer", "cpu")) == 1 and len(ways) == 7
    assert all(row["step_ms"] > 0 and row["memory"] == "measured" for row in rows)
    assert [row["swap_ms"] > 0 for row in rows if row["offload"] == "cpu"] == [True, True]


def test_a_table_has_a_row_for_each_way(training, rows, bench, capsys):
    bench("show").show(rows)
    shown = capsys.readouterr().out
    assert "fused layer" in shown and "end to end optimizer in backward" in shown
    assert "vit tiny, batch 4, float32" in shown and "sweep" in shown
    predicted = [row | dict.fromkeys(("step_ms", "p20_ms", "sweep_ms")) for row in rows]
    bench("show").show([row | {"memory": "predicted"} for row in predicted])
    shown = capsys.readouterr().out
    assert "sweep" not in shown and "predicted without running" in shown


def test_cases_are_those_of_the_device(training, monkeypatch):
    options = training.Options(device="cpu")
    names = [(case.family, case.preset, case.dtype) for case in options.cases()]
    assert names == [("vit", "cifar100", "float32"), ("dit", "digits", "float32")]
    large = training.Options(family="dit", preset=("XL/2",), device="cpu")
    (case,) = large.cases()
    assert (case.dtype, large.target_of(case).name) == ("autocast", "h100")
    assert {way.offload for way in large.ways(case)} == {"none", "cpu"}
    assert {way.offload for way in options.ways(options.cases()[0])} == {"none"}


def test_the_command_of_a_row_prints_a_table_when_it_is_repeated(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/b/training.py", "--json", "--family", "vit"])
    assert bench("command").called() == "python benchmarks/training.py --family vit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"methods": ("sgd",)}, "methods must be of end_to_end, .*, got sgd"),
        ({"recompute": ("all",)}, "recompute must be of none, .*, got all"),
        ({"dtype": ("float16",)}, "dtype must be of float32, autocast, got float16"),
        ({"offload": ("host",)}, "offload must be of none, cpu, got host"),
        ({"offload": ("cpu",)}, "offload must be none on a CPU, .* got cpu"),
        ({"nearest": "all", "beside": True}, "nearest must be of none, .* got all"),
        ({"nearest": "none"}, "nearest must be of none, .* come with beside, got none"),
        ({"budgets": (1.5,)}, "budgets must be from 0 to 1, got 1.5"),
        ({"num_blocks": (0,)}, "num_blocks must be from 1 to the 12 layers of cifar100, got 0"),
        ({"num_blocks": (13,)}, "num_blocks must be from 1 to the 12 layers of cifar100, got 13"),
        ({"rounds": 5, "num_blocks": (3,)}, "rounds must be at least 6, two .*, got 5"),
        ({"preset": ("S/2",)}, "preset must be given together with family, got S/2"),
        ({"family": "vit", "preset": ("huge",)}, "preset of vit must be one of .*, got huge"),
        ({"target": "tpu"}, "target must be one of cpu, a100, .*, got tpu"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_training_refuses_options_in_a_sentence(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("training").Options(**{"device": "cpu", **options})


def test_a_batch_that_was_halved_does_not_count(training, bench):
    options = training.Options(
        **SMALL, methods=("end_to_end",), num_blocks=(1,), optimizer_in_backward=(False,), rounds=2
    )
    (case,) = options.cases()
    way = bench("training_case").Way("end_to_end")
    steps = bench("training_step").make_steps(case, way, torch.device("cpu"), {})
    steps.trainer.micro_batch.size = 2
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 4 does not fit"):
        bench("training_memory").weigh(case, way, steps)
