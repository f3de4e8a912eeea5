import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dbkernels.memory.allocator import target_named
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.models import dit, vit
from dbkernels.planning.recipe import METHODS

CPU = torch.device("cpu")
ROWS = {"commit", "command", "copy_gbps", "matmul_tflops", "share_of_matmul_rate", "flops"}
SMALL = {"family": "vit", "preset": ("tiny",), "device": "cpu", "threads": 1, "batch": 4}


@pytest.fixture(scope="module")
def training(bench):
    """`benchmarks/training.py`, with a ViT of 5 layers and a DiT of 4."""
    sizes = {"dim": 16, "num_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        tiny = replace(vit.PRESETS["digits"], depth=5, mlp_hidden=64, **sizes)
        patch.setitem(vit.PRESETS, "tiny", tiny)
        patch.setitem(dit.PRESETS, "tiny", replace(dit.PRESETS["digits"], depth=4, **sizes))
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


ONE = {"methods": ("end_to_end",), "num_blocks": (1,), "optimizer_in_backward": (False,)}
ONE |= {"rounds": 2}


def rows_by(training, options, ready=None, failed=()):
    """All rows of the options' one model."""
    (model,) = options.models()
    return list(training.rows_of(model, options.ways(model), options, ready, list(failed)))


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

    monkeypatch.setattr(training, "weigh", out_of_memory)
    options = training.Options(**SMALL | ONE)
    (row,) = rows_by(training, options)
    assert row["memory"] == "predicted" and row["step_ms"] is None
    assert "end to end in 1 block does not fit the device" in capsys.readouterr().err


def test_a_way_that_fails_is_named_and_the_others_are_there(training, bench, monkeypatch, capsys):
    weigh = training.weigh

    def broken(recipe, *more):
        if recipe.method == "checkpointed":
            raise RuntimeError("an illegal address")
        return weigh(recipe, *more)

    monkeypatch.setattr(training, "weigh", broken)
    methods = ("end_to_end", "checkpointed", "selective")
    options = training.Options(**SMALL | ONE | {"methods": methods})
    with pytest.raises(SystemExit, match="failed: tiny, checkpointed in 1 block"):
        for rows in options.tables(bench("program").Known(None, None)):
            bench("program").emit(rows, replace(options, json=True))
    printed = capsys.readouterr()
    assert [json.loads(r)["method"] for r in printed.out.splitlines()] == [methods[0], methods[2]]
    assert "an illegal address" in printed.err


def test_a_row_without_times_comes_as_soon_as_its_way_is_weighed(training):
    options = training.Options(**SMALL | ONE)
    first, second = rows_by(training, replace(options, early=True, json=True))
    assert first["step_ms"] is None and second["step_ms"] > 0
    assert first["peak_allocated_bytes"] == second["peak_allocated_bytes"]
    assert len(rows_by(training, replace(options, early=True))) == 1


PEAKS = {0.9: 30, 0.6: 25, 0.5: 11, 0.4: 9, 0.3: 5, 0.2: 2}  # by budget


class Known:
    """Predictions that are there: of each budget its own, and of the rest 10.5."""

    def figures(self, recipe):
        peak = PEAKS.get(recipe.budget, 10.5)
        return {"peak_allocated_bytes": peak, "peak_reserved_bytes": 2 * peak, "flops": 1}


def test_the_budget_is_the_one_whose_peak_is_nearest(training, bench, monkeypatch):
    prepare = bench("training_memory")
    assert PEAKS.keys() == set(prepare.BUDGETS)
    monkeypatch.setattr(prepare.Preparation, "figures", Known.figures)
    monkeypatch.setattr(prepare.Preparation, "predict", lambda *_: None)
    (model,) = training.Options(**SMALL | ONE).models()
    way = prepare.Preparation(None, CPU).nearest(model, "none")
    assert (way.method, way.budget) == ("compiled", 0.5)


@pytest.fixture
def unready(bench):
    """A preparation whose processes die with their first task."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os._exit, 1).exception()
        yield bench("training_memory").Preparation(pool, CPU)


def test_without_predictions_ways_are_measured_all_the_same(training, unready, capfd):
    options = training.Options(**SMALL | ONE, beside=True, nearest="none")
    (model,) = options.models()
    unready.compile(options.ways(model))
    unready.predict(options.ways(model))
    (row,) = rows_by(training, options, unready)
    assert row["memory"] == "measured" and row["step_ms"] > 0
    assert row["predicted_peak_allocated_bytes"] is None
    told = capfd.readouterr().err
    assert "end to end in 1 block was not predicted: BrokenProcessPool" in told
    assert "was not compiled beside: BrokenProcessPool" in told


def test_what_is_waited_for_first_is_predicted_first(training, bench, monkeypatch):
    asked = []
    ready = bench("training_memory").Preparation(None, CPU)
    monkeypatch.setattr(ready, "_submit", lambda f, *rest: asked.append((f.__name__, rest)))
    monkeypatch.setattr(training, "preparing", lambda *_: nullcontext(ready))
    options = training.Options(**SMALL, num_blocks=(1, 2), beside=True, nearest="none")
    next(options.tables(bench("program").Known(None, None)))
    ways = [rest[-1] for name, rest in asked if name == "predicted"]
    known = bench("training_memory").candidates(options.models()[0], "none")
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
    options = training.Options(**SMALL | ONE)
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
    assert "fused layers, layer" in shown and "eager, optimizer in backward" in shown
    assert "ViT tiny, batch 4, float32" in shown and "sweep" in shown
    untimed = dict.fromkeys(("step_ms", "p20_ms", "p80_ms", "sweep_ms"))
    bench("show").show([row | untimed | {"memory": "predicted"} for row in rows])
    shown = capsys.readouterr().out
    assert "sweep" not in shown and "has run what is predicted" in shown


def test_cases_are_those_of_the_device(training, monkeypatch):
    options = training.Options(device="cpu")
    names = [(each.family, each.preset, each.autocast) for each in options.models()]
    assert names == [("vit", "cifar100", False), ("dit", "digits", False)]
    large = training.Options(family="dit", preset=("XL/2",), device="cpu")
    (model,) = large.models()
    assert (model.autocast, model.device.name) == (True, "h100")
    assert {way.offload for way in large.ways(model)} == {"none", "cpu"}
    assert {way.offload for way in options.ways(options.models()[0])} == {"none"}


def test_a_batch_that_was_halved_does_not_count(training, bench):
    (model,) = training.Options(**SMALL | ONE).models()
    (recipe,) = training.Options(**SMALL | ONE).ways(model)
    steps = bench("training_step").make_steps(recipe, CPU, {})
    steps.trainer.micro_batch.size = 2
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 4 does not fit"):
        training.weigh(recipe, steps)


# ways, trainers and steps


@pytest.fixture
def tiny(training, bench):
    """A recipe of the tiny DiT, by method, number of blocks, policy and more."""

    def recipe(method="end_to_end", num_blocks=1, recompute=None, **more):
        target = target_named("cpu")
        model = bench("training_step").model_of("dit", "tiny", 4, "float32", target)
        way = {"method": method, "num_blocks": num_blocks, "recompute": recompute}
        way |= {"recompute": recompute or "none"} if method == "block_fused" else {}
        return replace(model, **way, **more)

    return recipe


@pytest.fixture
def made(bench):
    """Makes trainers by their recipes; the first owns what the others train."""

    def make(*recipes, shared=True):
        trainers = []
        for recipe in recipes:
            owner = trainers[0] if trainers and shared else None
            trainers.append(bench("training_step").make_trainer(recipe, CPU, owner=owner))
        return trainers

    return make


def test_ways_stand_in_the_order_asked_for(bench, tiny):
    asked = {"num_blocks": (1, 3), "policies": ("none", "qkv"), "offload": ("none", "cpu")}
    asked |= {"budgets": (1.0, 0.5), "optimizer_in_backward": (False,), "launch": ("ops",)}
    named, methods = bench("training_step").named, ("end_to_end", "compiled", *METHODS[1:3])
    found = bench("training_step").ways(tiny(), (*methods, *METHODS[4:]), **asked)
    assert [named(way) for way in found] == [
        "tiny, end to end in 1 block",
        "tiny, compiled budget 1 in 1 block",
        "tiny, compiled budget 0.5 in 1 block",
        "tiny, checkpointed in 1 block",
        "tiny, selective in 1 block",
        "tiny, stock in 3 blocks",
        "tiny, fused none in 1 block",
        "tiny, fused qkv in 1 block",
        "tiny, fused none in 3 blocks",
        "tiny, fused qkv in 3 blocks",
        "tiny, fused none offload cpu in 3 blocks",
        "tiny, fused qkv offload cpu in 3 blocks",
    ]
    (stock,) = bench("training_step").ways(tiny(), ("block_stock",), **asked | {"num_blocks": (1,)})
    assert (stock.method, stock.num_blocks) == ("block_stock", 1)


def test_the_optimizer_is_in_the_backward_where_memory_is_the_aim(training):
    options = training.Options(
        **SMALL, num_blocks=(1, 2), recompute=("qkv",), budgets=(1.0,), target="h100"
    )
    every = options.ways(options.models()[0])
    found = [
        (w.method, w.num_blocks, w.offload, w.recompute) for w in every if w.optimizer_in_backward
    ]
    assert found == [
        ("end_to_end", 1, "none", None),
        ("checkpointed", 1, "none", None),
        ("block_fused", 1, "none", "qkv"),
        ("block_fused", 2, "cpu", "qkv"),
    ]
    assert sum(not way.optimizer_in_backward for way in every) == 8


def test_only_fused_layers_are_launched_as_graphs(training):
    options = training.Options(
        **SMALL | {"methods": ("end_to_end", "block_fused"), "num_blocks": (2,)},
        launch=("ops", "graph"), recompute=("qkv",), offload=("none",), target="h100",
        optimizer_in_backward=(False,),
    )  # fmt: skip
    every = options.ways(options.models()[0])
    assert [way.method for way in every] == ["end_to_end", "block_fused", "block_fused"]
    assert [way.config().trainer.cuda_graphs for way in every] == [False, False, True]


def test_ways_train_the_same_parameters_with_the_same_state(bench, made, tiny):
    trainers = made(tiny("end_to_end"), tiny("checkpointed"), tiny("block_fused", 2, "qkv"))
    first, *others = ({id(p) for p in t.blocks.parameters()} for t in trainers)
    assert all(each == first for each in others)
    moments = [
        {id(t) for group in trainer.groups.values() for t in group.optimizer_tensors().values()}
        for trainer in trainers
    ]
    assert moments[0] == moments[1] == moments[2]
    assert {buffer.device.type for buffer in trainers[2].blocks.buffers()} == {"cpu"}
    assert trainers[2].blocks.model.layers[0].config.recompute == "qkv"


def test_ways_have_the_same_noise_and_loss(bench, made, tiny):
    ways = [tiny("end_to_end"), tiny("selective"), tiny("block_fused", 1, "none")]
    ways += [tiny("end_to_end", optimizer_in_backward=True), tiny("block_fused", 1, "layer")]
    rows = [t.step_block(t.blocks[0]) for t in made(*ways, shared=False)]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    norms = [row["grad_norm"] for row in rows]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-4)


def test_ways_with_the_optimizer_in_the_backward_leave_the_others_alone(bench, made, tiny):
    first, second = made(tiny("end_to_end"), tiny("end_to_end", optimizer_in_backward=True))
    assert first.blocks.model.head.weight is second.blocks.model.head.weight
    counts = []
    for trainer in (first, second):
        trainer.updater.backward(trainer.blocks.model.head.weight.sum())
        counts.append(sum(p.grad is not None for p in trainer.blocks.parameters()))
        first.blocks.zero_grad()
    assert counts == [1, 0]


def test_steps_take_the_blocks_in_turn(bench, made, tiny):
    (trainer,) = made(tiny("block_stock", 3))
    steps = bench("training_step").Steps(trainer)
    steps.sweep()
    steps()
    assert steps.visited == [0, 1, 2, 0]
    assert [trainer.groups[f"block{i}"].steps for i in range(3)] == [2, 1, 1]


def test_policies_of_one_block_with_offload_are_one_trainers(bench, made, tiny):
    step = bench("training_step")
    ways = [tiny("block_fused", 2, recompute, offload="cpu") for recompute in ("none", "layer")]
    steps = {}
    for way in ways:
        steps[way] = step.make_steps(way, CPU, steps)
    none, layer = steps.values()
    assert none.trainer is layer.trainer
    policies = []
    for each in (none, layer, none):
        each()
        policies.append({of.config.recompute for of in each.trainer.blocks.model.layers})
    assert policies == [{"none"}, {"layer"}, {"none"}]


def test_a_step_finds_another_block_on_the_device_than_its_own(bench, made, tiny):
    step = bench("training_step")
    (trainer,) = made(tiny("block_fused", 2, "none", offload="cpu"))
    entered = []
    enter = trainer.offloader.enter
    trainer.offloader.enter = lambda name: entered.append(name) or enter(name)
    first = step.Steps(trainer, "none")
    second = step.Steps(trainer, "layer", beside=first)
    first()
    second.prepare()
    second()
    assert entered == ["block0", "block1", "block0"]
    second.prepare()  # block 1 is next, and block 0 is there
    assert len(entered) == 3


def test_a_time_is_averaged_over_the_blocks_medians(bench):
    times = bench("training_step").step_times([1, 10, 2, 20, 9, 30], [0, 1, 0, 1, 0, 1])
    assert (times["step_ms"], times["sweep_ms"]) == (11, 22)
    assert times["p20_ms"] == pytest.approx((1.4 + 14) / 2)
    assert times["p80_ms"] == pytest.approx((6.2 + 26) / 2)


def test_only_what_does_not_move_parameters_shares_them(bench, tiny):
    shares = bench("training_step").shares
    assert shares(tiny("end_to_end")) and shares(
        tiny("block_fused", 3, "none", optimizer_in_backward=True)
    )
    assert not shares(tiny("block_fused", 3, "none", offload="cpu"))


def test_no_step_with_the_optimizer_after_the_backward_calls_a_hook(bench, made, tiny):
    ways = [
        tiny(name, optimizer_in_backward=each)
        for name in ("end_to_end", "checkpointed")
        for each in (False, True)
    ]
    steps = {}
    for way in ways:
        steps[way] = bench("training_step").make_steps(way, CPU, steps)
    weights = [each.trainer.blocks.model.head.weight for each in steps.values()]
    assert weights[0] is weights[2] and weights[1] is weights[3]
    hooks = [weight._post_accumulate_grad_hooks for weight in weights]
    assert not hooks[0] and len(hooks[1]) == 2


def test_ways_with_offload_are_timed_apart_by_their_number_of_blocks(training, tiny):
    every = [tiny("end_to_end"), tiny("block_fused", 2, "none")]
    apart = [tiny("block_fused", n, "none", offload="cpu") for n in (2, 3, 2)]
    groups = training._groups([*every, *apart])
    assert groups == [every, [apart[0], apart[2]], [apart[1]]]


def test_what_runs_a_ways_layers_is_named(bench, tiny, monkeypatch):
    monkeypatch.setattr(bench("layer_case"), "implementation", lambda device, op: "cpp")
    name = bench("training_step").implementation_of
    names = [name(tiny(m), CPU) for m in ("block_fused", "compiled", "block_stock")]
    assert names == ["cpp", "inductor", "torch"]


# op after op

TIMELINE = {"family": "vit", "preset": "tiny", "device": "cpu", "batch": 4, "num_blocks": 2}


def rows_of_timeline(bench, options):
    (rows,) = options.tables(bench("program").Known(None, None))
    return list(rows)


@pytest.fixture(scope="module")
def timeline(training, bench):
    return bench("timeline")


@pytest.fixture(scope="module")
def drawn(timeline, bench):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/timeline.py", "--json", "--family", "vit"])
        return rows_of_timeline(bench, timeline.Options(**TIMELINE))


def test_rows_of_a_timeline_have_what_a_report_draws(drawn, tmp_path, monkeypatch, bench):
    monkeypatch.syspath_prepend(str(bench("machine").ROOT / "tools"))
    path = tmp_path / "timeline.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in drawn))
    read = bench("report_rows").read([path])
    assert read == json.loads(json.dumps(drawn))
    assert [(row["method"], row["num_blocks"], row["offload"]) for row in drawn] == [
        ("end_to_end", 1, "none"),
        ("checkpointed", 1, "none"),
        ("block_fused", 2, "cpu"),
    ]


def test_rows_say_where_they_come_from_and_that_nothing_ran(drawn):
    for row in drawn:
        assert (row["device"], row["driver"], row["memory"]) == ("H100", None, "predicted")
        assert row["command"] == "python benchmarks/timeline.py --family vit"
        assert row["torch"] == torch.__version__ and "commit" in row
        assert row["implementation"] == ("triton" if row["recompute"] else "torch")


def test_the_levels_reach_the_peak(drawn, timeline):
    for row in drawn:
        assert set(row["levels"]) == set(row["by_category"]) == set(CATEGORIES)
        totals = [sum(part) for part in zip(*row["levels"].values(), strict=True)]
        assert max(totals) == row["peak_allocated_bytes"]
        assert len(totals) == len(row["starts"]) <= timeline.PARTS
        assert [name for name, _ in row["phases"]][:2] == ["forward", "backward"]
        assert row["at"].partition(":")[0] in ("forward", "backward", "optimizer")
    whole, _, block = (row["levels"]["optimizer"][0] for row in drawn)
    # half of the layers, and what every block has
    assert 0.4 * whole < block < 0.7 * whole


def test_one_way_has_what_it_is_told(timeline, bench):
    options = timeline.Options(
        **TIMELINE, methods=("block_fused",), recompute="qkv", offload="none", target="a100"
    )
    (row,) = rows_of_timeline(bench, options)
    assert (row["recompute"], row["offload"], row["device"]) == ("qkv", "none", "A100")


def test_a_gpu_that_is_here_is_predicted_under_its_own_name(timeline, bench, monkeypatch):
    options, gpu = timeline.Options(**TIMELINE), target_named("a100")
    monkeypatch.setattr(bench("program"), "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(timeline, "target_of", lambda device: gpu)
    monkeypatch.setattr(timeline, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert options.predicted_for() is gpu
    assert {key["device"] for key in options.wanted()} == {"NVIDIA A100-SXM4-80GB"}


def test_the_table_of_a_timeline_can_be_read(drawn, bench, capsys):
    bench("show").show(drawn)
    shown = " ".join(capsys.readouterr().out.split())
    assert "ViT tiny, batch 4, autocast, H100" in shown
    assert "No H100 has run what is predicted" in shown
    assert "Printed by `python benchmarks/timeline.py --family vit`" in shown
    assert "fused layers, layer" in shown and "backward: " in shown
