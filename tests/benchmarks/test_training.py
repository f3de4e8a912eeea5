"""Training steps: their rows, the ways to train a model, and what is alive op after op."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import benchmark_rows as made
import pytest
import torch

from dbkernels.memory.allocator import target_named
from dbkernels.memory.tracker import CATEGORIES
from dbkernels.models import FAMILIES, dit, vit
from dbkernels.planning.recipe import METHODS, of_preset

CPU = torch.device("cpu")
ROWS = {"commit", "command", "copy_gbps", "matmul_tflops", "share_of_matmul_rate", "flops"}
EITHER = {"optimizer_in_backward": (False, True)}
TIMELINE = {"family": "vit", "preset": "tiny", "device": "cpu", "batch": 4, "num_blocks": 2}


@pytest.fixture(scope="module")
def training(bench):
    """`benchmarks/training.py`, with a ViT of 5 layers and a DiT of 4."""
    sizes = {"dim": 16, "num_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        tiny = replace(vit.PRESETS["digits"], depth=5, mlp_hidden=64, **sizes)
        patch.setitem(vit.PRESETS, "tiny", tiny)
        patch.setitem(dit.PRESETS, "tiny", replace(dit.PRESETS["digits"], depth=4, **sizes))
        yield bench("training")


@pytest.fixture(scope="module")
def options_of(training):
    """Options for the tiny ViT end to end, but for what is given."""
    usual = {"family": "vit", "preset": ("tiny",), "device": "cpu", "threads": 1, "batch": 4}
    usual |= {"methods": ("end_to_end",), "num_blocks": (1,), "rounds": 2}
    usual |= {"optimizer_in_backward": (False,)}
    return lambda **given: training.Options(**usual | given)


@pytest.fixture(scope="module")
def rows_by(training, bench):
    """All rows of some options, none of which is known."""

    def run(options, ready=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "preparing", lambda *_: nullcontext(ready))
            tables = options.tables(bench("program").Known(None, None))
            return [row for table in tables for row in table]

    return run


@pytest.fixture(scope="module")
def rows(options_of, rows_by):
    """Of every method that compiles nothing, by method, number of blocks and policy."""
    methods = tuple(method for method in METHODS if method != "compiled")
    return rows_by(
        options_of(
            methods=methods, num_blocks=(1, 2), recompute=("none", "layer"), rounds=4, **EITHER
        )
    )


def plain(rows):
    """The rows with the optimizer after the backward, by what tells them apart."""
    return {
        (row["method"], row["num_blocks"], row["recompute"]): row
        for row in rows
        if not row["optimizer_in_backward"]
    }


def test_rows_have_what_a_report_reads(rows, bench, tmp_path):
    fused = bench("layer_case").Competitor("fused").implementation(CPU)
    assert bench("show").read([made.write(tmp_path / "rows.jsonl", rows)]) == rows
    for row in rows:
        assert row.keys() >= ROWS
        assert row["implementation"] == (fused if row["method"] == "block_fused" else "torch")
        assert (row["suite"], row["memory"], row["offload"]) == ("training", "measured", "none")
        assert 0 < row["p20_ms"] <= row["step_ms"] <= row["p80_ms"]
        assert row["sweep_ms"] == pytest.approx(row["num_blocks"] * row["step_ms"])
        assert row["samples_per_second"] == pytest.approx(4e3 / row["step_ms"])
        assert row["achieved_tflops"] == pytest.approx(row["flops"] / row["step_ms"] / 1e9)


def test_a_row_tells_what_its_way_keeps(rows):
    saved = {way: row["saved_bytes"] for way, row in plain(rows).items()}
    whole, half = saved["end_to_end", 1, None], saved["block_stock", 2, None]
    assert saved["checkpointed", 1, None] < saved["selective", 1, None] < whole
    assert 0.55 * whole < half < 0.7 * whole  # of 5 layers the larger block has 3
    for count, stock in ((1, whole), (2, half)):
        layer, none = (saved["block_fused", count, recompute] for recompute in ("layer", "none"))
        assert layer < none < stock


def test_a_peak_is_what_its_categories_add_up_to(rows):
    for row in rows:
        parts = row["by_category"]
        assert row["peak_allocated_bytes"] == pytest.approx(sum(parts.values()), rel=0.02)
        # AdamW has two moments of each parameter
        assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
        assert row["saved_bytes"] < row["peak_allocated_bytes"]


def test_operations_are_averaged_over_blocks_that_differ(rows):
    flops = {way: row["flops"] for way, row in plain(rows).items()}
    whole = flops["end_to_end", 1, None]
    # the stem and the head are in every step, and in 4 samples of 17 tokens weigh little
    assert whole / 2 <= flops["block_stock", 2, None] < 0.55 * whole
    # a fused ViT computes of its last layer what it reads
    assert flops["block_fused", 1, "none"] < whole < flops["checkpointed", 1, None]


def test_a_gpu_that_is_not_there_is_predicted(options_of, rows_by):
    methods = ("checkpointed", "end_to_end", "block_fused")
    few = {"methods": methods, "num_blocks": (2,), "recompute": ("qkv",)}
    found = {
        (row["method"], row["offload"], row["optimizer_in_backward"]): row
        for row in rows_by(options_of(target="h100", **few, **EITHER))
    }
    peaks = {way: row["peak_allocated_bytes"] for way, row in found.items()}
    for method in methods[:2]:
        assert peaks[method, "none", True] < peaks[method, "none", False]
    for row in found.values():
        assert (row["device"], row["driver"], row["memory"]) == ("H100", None, "predicted")
        assert row["step_ms"] is row["copy_gbps"] is row["share_of_matmul_rate"] is None
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > 0
        assert sum(row["by_category"].values()) == row["peak_allocated_bytes"]
    # one dry run tells what all blocks need and what one needs
    every, one = (found["block_fused", place, False] for place in ("none", "cpu"))
    assert every["peak_allocated_bytes"] > one["peak_allocated_bytes"]
    assert every["saved_bytes"] == one["saved_bytes"]


def test_a_way_that_fails_is_named_and_one_that_does_not_fit_is_predicted(
    training, options_of, bench, monkeypatch, capsys
):
    weigh = training.weigh

    def broken(recipe, *more):
        if recipe.method == "checkpointed":
            raise RuntimeError("an illegal address")
        if recipe.method == "selective":
            raise torch.OutOfMemoryError("out of memory")
        return weigh(recipe, *more)

    monkeypatch.setattr(training, "weigh", broken)
    options = options_of(methods=("end_to_end", "checkpointed", "selective"), json=True)
    with pytest.raises(SystemExit, match="failed: tiny, checkpointed, every layer, end to end"):
        for rows in options.tables(bench("program").Known(None, None)):
            bench("program").emit(rows, options)
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    assert (first["method"], first["memory"]) == ("end_to_end", "measured")
    assert (second["method"], second["memory"]) == ("selective", "predicted")
    assert first["step_ms"] > 0 and second["step_ms"] is None
    assert "an illegal address" in printed.err
    assert "selective, end to end does not fit the device" in printed.err


def test_a_row_without_times_comes_as_soon_as_its_way_is_weighed(options_of, rows_by):
    first, second = rows_by(options_of(early=True, json=True))
    assert first["step_ms"] is None and second["step_ms"] > 0
    assert first["peak_allocated_bytes"] == second["peak_allocated_bytes"]
    assert len(rows_by(options_of(early=True))) == 1


PEAKS = {0.9: 30, 0.6: 25, 0.5: 11, 0.4: 9, 0.3: 5, 0.2: 2}  # by budget


class Known:
    """Predictions that are there: of each budget its own, and of the rest 10.5."""

    def figures(self, recipe):
        peak = PEAKS.get(recipe.budget, 10.5)
        return {"peak_allocated_bytes": peak, "peak_reserved_bytes": 2 * peak, "flops": 1}

    def compile(self, every):
        pass

    predict = compile


def test_the_budget_is_the_one_whose_peak_is_nearest(options_of, bench):
    prepare = bench("training_memory")
    assert PEAKS.keys() == set(prepare.BUDGETS)
    (model,) = options_of().models()
    way = prepare.Preparation.nearest(Known(), model, "none")
    assert (way.method, way.budget) == ("compiled", 0.5)


def test_without_predictions_ways_are_measured_all_the_same(options_of, rows_by, bench, capfd):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os._exit, 1).exception()  # the processes die with their first task
        unready = bench("training_memory").Preparation(pool, CPU)
        (row,) = rows_by(options_of(beside=True, nearest="none"), unready)
    assert row["memory"] == "measured" and row["step_ms"] > 0
    assert row["predicted_peak_allocated_bytes"] is None
    told = capfd.readouterr().err
    assert "eager, end to end was not predicted: BrokenProcessPool" in told
    assert "was not compiled beside: BrokenProcessPool" in told


def test_what_is_waited_for_first_is_predicted_first(training, options_of, bench, monkeypatch):
    asked, prepare = [], bench("training_memory")
    pool = SimpleNamespace(submit=lambda _run, _rehearse, *task: asked.append(task[:2]))
    ready = nullcontext(prepare.Preparation(pool, CPU))
    monkeypatch.setattr(training, "preparing", lambda *_: ready)
    options = options_of(methods=METHODS, num_blocks=(1, 2), rounds=4, beside=True, nearest="none")
    next(options.tables(bench("program").Known(None, None)))
    ways = [recipe for function, recipe in asked if function is prepare.predicted]
    known = prepare.candidates(options.models()[0], "none")
    assert ways[: len(known)] == known and len(ways) == len(set(ways))


def test_what_was_predicted_stands_beside_and_nothing_runs_while_steps_are_timed(
    options_of, rows_by, bench, monkeypatch
):
    told, measure = [], bench("measure")
    ready, samples = Known(), measure.samples
    ready.wait = lambda: told.append("rests")
    monkeypatch.setattr(
        measure, "samples", lambda *a, **k: told.append("times") or samples(*a, **k)
    )
    (row,) = rows_by(options_of(beside=True), ready)
    assert row["predicted_peak_allocated_bytes"] == 10.5
    assert row["predicted_peak_reserved_bytes"] == 21
    assert "rests" in told and told.index("rests") < told.index("times")


def test_a_rehearsal_runs_what_a_gpu_alone_measures(training, options_of, rows_by, monkeypatch):
    together, timed = [], training._timed
    monkeypatch.setattr(
        training, "_timed", lambda steps, *more: together.append([*steps]) or timed(steps, *more)
    )
    options = options_of(
        family="dit", preset=("rehearsal",), batch=2, methods=("block_fused", "compiled"),
        num_blocks=(2, 3), recompute=("none", "layer"), budgets=(1.0,), rounds=6,
        offload=("none", "cpu"), rehearse=True,
    )  # fmt: skip
    rows = rows_by(options)
    assert all(row["step_ms"] > 0 and row["memory"] == "measured" for row in rows)
    assert {row["method"] for row in rows if row["implementation"] == "inductor"} == {"compiled"}
    assert [row["swap_ms"] > 0 for row in rows if row["offload"] == "cpu"] == [True] * 4
    # ways with offload are timed apart, by their number of blocks
    here, two, three = (
        [(count, policy, place) for count in counts for policy in ("none", "layer")]
        for counts, place in (((2, 3), "none"), ((2,), "cpu"), ((3,), "cpu"))
    )
    found = [[(way.num_blocks, way.recompute, way.offload) for way in ways] for ways in together]
    assert found == [[*here, (1, None, "none")], two, three]


def test_cases_are_those_of_the_device(training):
    options = training.Options(device="cpu")
    names = [(each.family, each.preset, each.autocast) for each in options.models()]
    assert {"vit": "cifar100", "dit": "digits", "mdm": "small"}.items() <= {
        family: preset for family, preset, _ in names
    }.items()
    assert {family for family, *_ in names} == FAMILIES.keys()
    assert not any(autocast for *_, autocast in names)
    large = training.Options(family="dit", preset=("XL/2",), device="cpu")
    (model,) = large.models()
    assert (model.autocast, model.device.name) == (True, "h100")
    assert {way.offload for way in large.ways(model)} == {"none", "cpu"}
    assert {way.offload for way in options.ways(options.models()[0])} == {"none"}


def test_a_model_of_text_is_asked_of_with_several_vocabularies(training, bench):
    few = {"methods": ("end_to_end",), "dtype": ("float32",), "device": "cpu", "target": "h100"}
    few |= {"optimizer_in_backward": (False,)}
    options = training.Options(family="mdm", words=(300, 5), **few)
    assert [each.model.vocabulary for each in options.models()] == [300, 5]
    keys = options.wanted()
    assert [key["words"] for key in keys] == [300, 5]
    tables = options.tables(bench("program").Known(None, None))
    many, few = (row for rows in tables for row in rows)
    assert many["peak_allocated_bytes"] > few["peak_allocated_bytes"]
    show = bench("show")  # one vocabulary to a table
    assert len(show.tables([many, few], "training")) == 2
    assert show.case_text(many) == "MDM small, 300 words, batch 64, float32"


def test_a_batch_that_was_halved_does_not_count(training, options_of, bench):
    options = options_of()
    (recipe,) = options.ways(options.models()[0])
    steps = bench("training_step").make_steps(recipe, CPU, {})
    steps.trainer.micro_batch.size = 2
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 4 does not fit"):
        training.weigh(recipe, steps)


# ways, trainers and steps


@pytest.fixture
def tiny(training):
    """A recipe of the tiny DiT, by method, number of blocks, policy and more."""
    model = replace(of_preset("dit", "tiny"), batch_size=4, device=target_named("cpu"))

    def recipe(method="end_to_end", num_blocks=1, recompute=None, **more):
        policy = recompute or "none" if method == "block_fused" else None
        return replace(model, method=method, num_blocks=num_blocks, recompute=policy, **more)

    return recipe


@pytest.fixture
def steps_of(bench):
    """Steps by their recipes, each made beside those before it."""

    def make(*recipes):
        steps = {}
        for recipe in recipes:
            steps[recipe] = bench("training_step").make_steps(recipe, CPU, steps)
        return list(steps.values())

    return make


@pytest.fixture
def found(options_of, bench):
    """The ways of some options in words, on a GPU that is not there."""

    def named(**given):
        options = options_of(target="h100", **given)
        return [bench("training_step").named(w) for w in options.ways(*options.models())]

    return named


def test_ways_stand_in_the_order_asked_for(found):
    asked = {"num_blocks": (1, 3), "recompute": ("none", "qkv"), "budgets": (1.0, 0.5)}
    methods = ("end_to_end", "compiled", *METHODS[1:3], *METHODS[4:])
    assert found(methods=methods, **asked) == [
        "tiny, eager, end to end",
        *(f"tiny, torch.compile, budget {budget}, end to end" for budget in (1, 0.5)),
        *(f"tiny, checkpointed, {what}, end to end" for what in ("every layer", "selective")),
        "tiny, eager layers, 3 blocks",
        *(
            f"tiny, fused layers, {policy}, {cut}"
            for cut in ("end to end", "3 blocks", "3 blocks, offload")
            for policy in ("none", "qkv")
        ),
    ]
    assert found(methods=("block_stock",)) == ["tiny, eager layers, end to end"]


def test_the_optimizer_is_in_the_backward_where_memory_is_the_aim(found):
    few = {"num_blocks": (1, 2), "recompute": ("qkv",), "budgets": (1.0,)}
    ways = found(methods=METHODS, **few, **EITHER)
    ends = ("eager", "checkpointed, every layer", "fused layers, qkv")
    assert [way for way in ways if "optimizer" in way] == [
        *(f"tiny, {end}, optimizer in backward, end to end" for end in ends),
        "tiny, fused layers, qkv, optimizer in backward, 2 blocks, offload",
    ]
    assert len(ways) == 4 + 8


def test_only_fused_layers_are_launched_as_graphs(options_of):
    few = {"num_blocks": (2,), "recompute": ("qkv",), "offload": ("none",), "target": "h100"}
    options = options_of(methods=("end_to_end", "block_fused"), launch=("ops", "graph"), **few)
    found = [
        (way.method, way.config().trainer.cuda_graphs) for way in options.ways(*options.models())
    ]
    assert found == [("end_to_end", False), ("block_fused", False), ("block_fused", True)]


def test_ways_train_the_same_parameters_with_the_same_state(steps_of, tiny):
    ways = tiny("end_to_end"), tiny("checkpointed"), tiny("block_fused", 2, "qkv")
    trainers = [steps.trainer for steps in steps_of(*ways)]
    first, *others = ({id(p) for p in t.blocks.parameters()} for t in trainers)
    assert all(each == first for each in others)
    first, *others = (
        {id(t) for group in trainer.groups.values() for t in group.optimizer_tensors().values()}
        for trainer in trainers
    )
    assert first and all(each == first for each in others)
    assert {p.device.type for p in trainers[2].blocks.parameters()} == {"cpu"}
    assert trainers[2].blocks.model.layers[0].config.recompute == "qkv"


def test_ways_have_the_same_noise_and_loss(steps_of, tiny):
    ways = [tiny("end_to_end"), tiny("selective"), tiny("block_fused", 1, "none")]
    ways += [tiny("end_to_end", optimizer_in_backward=True), tiny("block_fused", 1, "layer")]
    trainers = [steps_of(way)[0].trainer for way in ways]
    first, *rows = (t.step_block(t.blocks[0]) for t in trainers)
    for row in rows:
        assert row["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_steps_take_the_blocks_in_turn(steps_of, tiny):
    (steps,) = steps_of(tiny("block_stock", 3))
    steps.sweep()
    steps()
    assert steps.visited == [0, 1, 2, 0]
    assert [steps.trainer.groups[f"block{i}"].steps for i in range(3)] == [2, 1, 1]


def test_policies_of_one_block_with_offload_are_one_trainers(steps_of, tiny):
    ways = [tiny("block_fused", 2, recompute, offload="cpu") for recompute in ("none", "layer")]
    _, none, layer, other = steps_of(tiny("end_to_end"), *ways, tiny("block_fused", 2))
    assert none.trainer is layer.trainer is not other.trainer
    policies, entered, enter = [], [], none.trainer.offloader.enter
    none.trainer.offloader.enter = lambda name: entered.append(name) or enter(name)
    for each in (none, layer):
        each.prepare()
        each()
        policies.append({of.config.recompute for of in each.trainer.blocks.model.layers})
    assert policies == [{"none"}, {"layer"}]
    # a step finds another block on the device than its own
    assert entered == ["block0", "block1", "block0"]
    layer.prepare()  # block 1 is next, and block 0 is there
    assert len(entered) == 3
    none()
    assert {of.config.recompute for of in none.trainer.blocks.model.layers} == {"none"}


def test_a_time_is_averaged_over_the_blocks_medians(bench):
    times = bench("training_step").step_times([1, 10, 2, 20, 9, 30], [0, 1, 0, 1, 0, 1])
    assert (times["step_ms"], times["sweep_ms"]) == (11, 22)
    assert times["p20_ms"] == pytest.approx((1.4 + 14) / 2)
    assert times["p80_ms"] == pytest.approx((6.2 + 26) / 2)


def test_no_step_with_the_optimizer_after_the_backward_calls_a_hook(steps_of, tiny):
    every = [(name, each) for name in ("end_to_end", "checkpointed") for each in (False, True)]
    steps = steps_of(*(tiny(name, optimizer_in_backward=each) for name, each in every))
    weights = [each.trainer.blocks.model.head.weight for each in steps]
    assert weights[0] is weights[2] and weights[1] is weights[3]
    hooks = [weight._post_accumulate_grad_hooks for weight in weights]
    assert not hooks[0] and len(hooks[1]) == 2


# op after op


@pytest.fixture(scope="module")
def timeline(training, bench):
    """The rows of `benchmarks/timeline.py` by its options."""

    def rows_of(**more):
        options = bench("timeline").Options(**TIMELINE, **more)
        (rows,) = options.tables(bench("program").Known(None, None))
        return list(rows)

    return rows_of


@pytest.fixture(scope="module")
def drawn(timeline):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["benchmarks/timeline.py", "--json", "--family", "vit"])
        return timeline()


def test_rows_of_a_timeline_have_what_a_report_draws(drawn, bench, tmp_path):
    read = bench("show").read([made.write(tmp_path / "rows.jsonl", drawn)])
    assert read == json.loads(json.dumps(drawn))
    ways = [("end_to_end", 1, "none"), ("checkpointed", 1, "none"), ("block_fused", 2, "cpu")]
    assert [(row["method"], row["num_blocks"], row["offload"]) for row in drawn] == ways
    for row in drawn:
        assert (row["device"], row["driver"], row["memory"]) == ("H100", None, "predicted")
        assert row["command"] == "python benchmarks/timeline.py --family vit"
        assert row["torch"] == torch.__version__ and "commit" in row
        assert row["implementation"] == ("triton" if row["recompute"] else "torch")


def test_the_levels_reach_the_peak(drawn, bench):
    for row in drawn:
        assert set(row["levels"]) == set(row["by_category"]) == set(CATEGORIES)
        totals = [sum(part) for part in zip(*row["levels"].values(), strict=True)]
        assert max(totals) == row["peak_allocated_bytes"]
        assert len(totals) == len(row["starts"]) <= bench("timeline").PARTS
        assert [name for name, _ in row["phases"]][:2] == ["forward", "backward"]
        assert row["at"].partition(":")[0] in ("forward", "backward", "optimizer")
    whole, _, block = (row["levels"]["optimizer"][0] for row in drawn)
    # half of the layers, and what every block has
    assert 0.4 * whole < block < 0.7 * whole


def test_one_way_has_what_it_is_told(timeline):
    told = {"recompute": "qkv", "offload": "none"}
    (row,) = timeline(methods=("block_fused",), target="a100", **told)
    assert told.items() <= row.items() and row["device"] == "A100"


def test_a_gpu_that_is_here_is_predicted_under_its_own_name(training, bench, monkeypatch):
    gpu = target_named("a100")
    for module in (bench("program"), training):
        monkeypatch.setattr(module, "target_of", lambda device: gpu)
    monkeypatch.setattr(bench("program"), "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(training, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    options = bench("timeline").Options(**TIMELINE)
    assert options.gpu("auto") is gpu and {way.device for way in options.ways()} == {gpu}
    assert {key["device"] for key in options.wanted()} == {"NVIDIA A100-SXM4-80GB"}
