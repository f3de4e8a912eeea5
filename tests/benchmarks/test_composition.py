"""What blocks and other ways to need less memory give together."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops.philox import Draw
from dbkernels.planning.recipe import of_preset

CASES = [("dit", 1), ("ar", 1), ("dit", 2)]  # of a pipeline: the family, and the number of blocks


@pytest.fixture(scope="module")
def rows(bench):
    """What a quick table has, by its number of blocks and its way."""
    composition = bench("composition")
    options = composition.Options(quick=True, family=("ar",), device="cpu")
    found = [row for table in options.tables(bench("program").Known(None, None)) for row in table]
    return {(row["num_blocks"], row["way"]): row for row in found}


def peak(rows, *key):
    return rows[key]["peak_allocated_bytes"]


def test_a_row_is_a_way_on_a_number_of_blocks(rows, bench):
    options = bench("composition").Options(quick=True, family=("ar",), device="cpu")
    wanted = options.wanted()
    assert [row.items() >= key.items() for row, key in zip(rows.values(), wanted, strict=True)]
    assert {count for count, _ in rows} == {1, 2}
    # with one block nothing can wait on the host, and there is one job
    assert (1, "parameter offload") not in rows and (1, "one job") not in rows
    for row in rows.values():
        assert row["memory"] == "predicted"
        if row["refused"] is None:
            assert sum(row["by_category"].values()) == row["peak_allocated_bytes"]


def test_a_job_has_one_block_unless_it_has_all(rows):
    one, every = rows[2, "alone"], rows[2, "one job"]
    assert every["by_category"]["optimizer"] == rows[1, "alone"]["by_category"]["optimizer"]
    moved = rows[2, "parameter offload"]
    for row in (one, moved):
        assert row["by_category"]["optimizer"] < 0.6 * every["by_category"]["optimizer"]
    # the table of the target is frozen where each block has a job, and so has no optimizer
    assert one["by_category"]["optimizer"] < moved["by_category"]["optimizer"]
    assert peak(rows, 2, "alone") < peak(rows, 2, "parameter offload") < peak(rows, 2, "one job")
    assert every["verdict"] == "harmful"


def test_what_is_copied_to_the_host_is_counted_where_something_is(rows):
    assert rows[2, "alone"]["host_bytes"] == 0
    moved = rows[2, "one job"]["by_category"], rows[2, "parameter offload"]["by_category"]
    of_block = [sum(each[name] for name in ("parameters", "optimizer")) for each in moved]
    # of two blocks one comes and one goes; each is as large as what is not there
    assert rows[2, "parameter offload"]["host_bytes"] == 2 * (of_block[0] - of_block[1])
    kept = rows[1, "activation offload"]["host_bytes"]
    # almost all of it goes, and comes back
    assert 1.6 < kept / rows[1, "alone"]["by_category"]["saved_activations"] < 2.4
    assert kept > rows[1, "activation offload + recompute layer"]["host_bytes"] > 0


def test_a_sweep_has_a_step_of_every_block(rows):
    there = {key: row for key, row in rows.items() if row["refused"] is None}
    for (count, _), row in there.items():
        assert row["sweep_flops"] == count * row["flops"]
    assert rows[2, "recompute layer"]["flops"] > 1.2 * rows[2, "alone"]["flops"]
    # each of 8 GPUs has as many samples as one alone, and each of 2 that share layers half the work
    assert rows[1, "FSDP2 8"]["flops"] == rows[1, "alone"]["flops"]
    assert 0.5 <= rows[1, "tensor 2"]["flops"] / rows[1, "alone"]["flops"] < 0.51


@pytest.mark.parametrize(("depth", "count"), [(28, 3), (28, 4), (7, 4), (5, 2)])
def test_a_sweep_of_uneven_blocks_counts_each_layer_once(bench, depth, count):
    ways = bench("composition_ways")
    way = ways.Way(count, ("one job",))
    outside, layer, largest = 700, 11, -(-depth // count)
    flops = {way: outside + layer * largest, ways.Way(1): outside + layer * depth}
    recipe = replace(of_preset("dit", "digits"), batch_size=8)
    recipe = ways.Way(1).recipe(replace(recipe, model=replace(recipe.model, depth=depth)))
    assert ways.sweep_flops(way, recipe, flops) == count * outside + layer * depth
    # the longest stage of a pipeline is as long in a block of fewer layers
    recipe = replace(recipe, stages=2)
    assert ways.sweep_flops(way, recipe, flops) == count * (outside + layer * largest)


@pytest.mark.parametrize(
    ("both", "verdict"),
    [
        # blocks leave 0.5 of 1000 and the other way 0.6
        (300, "additive"),
        (329, "additive"),
        (331, "overlapping"),
        (499, "overlapping"),
        (505, "overlapping"),
        (506, "harmful"),
        (900, "harmful"),
    ],
)
def test_a_verdict_is_by_the_product_of_the_ratios_and_the_better_part(bench, both, verdict):
    ways = bench("composition_ways")
    way = ways.Way(3, ("tensor 2",))
    peaks = {ways.Way(1): 1000, ways.Way(3): 500, ways.Way(1, ("tensor 2",)): 600, way: both}
    found = ways.compared(way, peaks)
    assert found["verdict"] == verdict
    assert found["product"] == pytest.approx(0.3)
    assert (found["ratio"], found["saved"], found["apart"]) == (both / 1000, 1000 - both, 900)


def test_three_parts_are_harmful_where_two_of_them_need_less(bench):
    ways = bench("composition_ways")
    way = ways.Way(3, ("tensor 2", "FSDP2 8"))
    parts = {ways.Way(1): 1000, ways.Way(3): 500, ways.Way(1, ("tensor 2",)): 600}
    parts |= {ways.Way(1, ("FSDP2 8",)): 400, way: 200}
    assert ways.compared(way, parts)["verdict"] == "overlapping"
    assert ways.compared(way, parts)["product"] == pytest.approx(0.12)
    assert ways.compared(way, parts | {ways.Way(3, ("FSDP2 8",)): 190})["verdict"] == "harmful"
    assert ways.compared(way, parts | {ways.Way(1, way.parts): 190})["verdict"] == "harmful"


def test_layers_in_plain_torch_are_compared_with_plain_torch(bench):
    ways = bench("composition_ways")
    way = ways.Way(3, ("checkpointing",))
    peaks = {ways.Way(1): 1, ways.Way(3): 1, way: 200, ways.Way(1, ("checkpointing",)): 500}
    peaks |= {ways.Way(1, ("plain torch",)): 1000, ways.Way(3, ("plain torch",)): 400}
    assert ways.compared(way, peaks)["product"] == pytest.approx(0.2)
    plain = ways.compared(ways.Way(3, ("plain torch",)), peaks)
    assert plain["ratio"] == 0.4 and plain["verdict"] is None


def test_a_way_that_a_trainer_refuses_has_a_row_with_the_reason(rows):
    refused = {way: row for (count, way), row in rows.items() if row["refused"]}
    assert refused.keys() == {"FSDP2 8 + optimizer in backward"}
    (row,) = refused.values()
    assert "optimizer_in_backward must be off with 8 processes" in row["refused"]
    assert row["peak_allocated_bytes"] is row["verdict"] is row["sent_bytes"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"family": ("vit",)}, "family must be of dit, ar, got vit"),
        ({"dtype": "float16"}, "dtype must be of float32, autocast, got float16"),
        ({"num_blocks": (2, 3)}, r"num_blocks must have 1, got \(2, 3\)"),
        ({"num_blocks": (1, 29)}, "num_blocks must be between 1 and the 28 layers, got 29"),
        ({"target": "v100"}, "target must be one of .*, got v100"),
        ({"measure": True, "rounds": 1}, "rounds must be at least 2, got 1"),
    ],
)
def test_rejects(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("composition").Options(device="cpu", **options)


def test_a_table_is_printed_and_what_a_file_has_is_not_followed_again(
    run_main, bench, monkeypatch, tmp_path
):
    sizes = {"parameters": 3 * 2**30, "optimizer": 2**30}
    row = {"peak_allocated_bytes": 2**32, "by_category": sizes, "flops": 10**12}
    row |= {"sent_bytes": 2**20, "sent": {"send": 2**20}, "copied_bytes": 7 * 2**20}
    row |= {"swapped_bytes": 0}
    refused = {"refused": {"refused": "it is so"}}

    def followed(model, way):
        return refused if way.parts == ("activation offload",) else {"none": row}

    monkeypatch.setattr(bench("composition"), "followed", followed)
    words = f"--quick --family dit --device cpu --threads 1 --out {tmp_path / 'rows.jsonl'}"
    said = run_main("composition", words)
    assert "composition: DiT of 4 layers, batch 8, autocast, H100" in said
    assert "No H100 has run what is predicted" in said
    assert "4.00 GiB" in said and "7.00 MiB" in said and "refused" in said
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) > 20 and {json.loads(line)["suite"] for line in lines} == {"composition"}
    monkeypatch.setattr(bench("composition"), "followed", None)
    assert not run_main("composition", words)


# a pipeline


@pytest.fixture(scope="module")
def ranks(bench):
    """What starts two stages; it reads the benchmarks' files."""
    return importlib.import_module("benchmarks.pipeline_ranks")


@pytest.fixture(scope="module")
def stages(ranks, tmp_path_factory):
    """What two stages found, each a process, by rank and case."""
    return ranks.run(tmp_path_factory.mktemp("stages"), CASES)


@pytest.fixture
def whole(ranks):
    """Loss and gradients of a model that one process has."""

    def of(case):
        recipe = ranks.recipe_of(*case)
        piece = ranks.piece_of(recipe, 0, 1)
        loss = piece.stage(*piece.reads, **piece.aims).sum()
        loss.backward()
        return loss, ranks.named_as_in_the_whole(piece, recipe, 0, 1, lambda p: p.grad)

    return of


@pytest.mark.parametrize("case", CASES)
def test_stages_have_the_loss_and_the_gradients_of_one_process(stages, whole, case):
    loss, grads = whole(case)
    first, last = (found[case] for found in stages)
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-6) and first["loss"] == 0
    assert not first["grads"].keys() & last["grads"].keys()
    found = first["grads"] | last["grads"]
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name
        assert grad.any(), name


@pytest.mark.parametrize("case", CASES)
def test_one_stage_has_the_loss_of_the_block(case, ranks, bench):
    recipe = ranks.recipe_of(*case)
    torch.manual_seed(0)
    blocks = recipe.config().build("cpu")
    pipelined = bench("pipelined")
    batch = pipelined.made_up_batch(recipe)
    name = "loss" if recipe.objective == "blocks" else "conventional_loss"
    loss = getattr(blocks, name)(blocks[0], batch, Draw(0, 0))
    torch.manual_seed(0)
    piece = pipelined.piece_of(recipe, 0, 1)
    found = piece.stage(*piece.reads, **piece.aims)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_stage_is_predicted_within_half_a_percent(stages, case, ranks, bench):
    recipe = ranks.recipe_of(*case)
    with FakeTensorMode():
        found = bench("pipelined").every_stage(recipe, ranks.STAGES)
    for predicted, measured in zip(found, (each[case] for each in stages), strict=True):
        assert predicted["peak_allocated_bytes"] == pytest.approx(measured["peak"], rel=5e-3)
        assert predicted["sent"] == measured["sent"]


@pytest.mark.parametrize("case", CASES)
def test_the_first_stage_keeps_two_microbatches_and_the_last_one(stages, case):
    first, last = (found[case]["saved"] for found in stages)
    # three layers and two, of as many tokens
    assert 2 * 3 / 2 * 0.8 < first / last < 2 * 3 / 2 * 1.2


# two processes

WAYS = [
    (2, ()),
    (1, ("FSDP2 2",)),
    (2, ("FSDP2 2", "recompute layer")),
    (1, ("tensor 2",)),
    (2, ("tensor 2",)),
    (2, ("checkpointing",)),
    (1, ("optimizer in backward",)),
]


@pytest.fixture(scope="module")
def both(bench):
    """What a dry run says of each way, and what two processes find."""
    composition, gloo = bench("composition"), bench("composition_gloo")
    model = composition.Options(measure=True, family=("ar",), device="cpu").models()[0]
    small = {"depth": 4, "dim": 64, "mlp_hidden": 256}
    model = replace(model, model=replace(model.model, **small))
    ways = [bench("composition_ways").Way(*way) for way in WAYS]
    measured = gloo.rows_of(model, ways, rounds=2)
    told = [composition.followed(model, way) for way in ways]
    told = [each["cpu" if "cpu" in each else "none"] for each in told]
    return dict(zip(WAYS, zip(told, measured, strict=True), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_dry_run_counts_is_what_processes_send_and_compute(both, way):
    told, measured = both[way]
    assert told["sent"] == measured["sent"] and told["flops"] == measured["flops"]
    assert bool(told["sent"]) == any("2" in part for part in way[1])
    assert measured["step_ms"] > 0
    if "FSDP2 2" not in way[1]:
        assert told["peak_allocated_bytes"] == measured["peak_allocated_bytes"]


def test_of_a_collective_its_whole_buffer_counts(both):
    told, _ = both[1, ("FSDP2 2",)]
    state = told["by_category"]["optimizer"]  # two moments of half the parameters
    reduced, gathered = told["sent"]["reduce_scatter"], told["sent"]["all_gather"]
    # the network without noise reads no embedding of levels
    assert 0.75 * state < reduced <= state
    # layers gather their weights again for the backward, and what is in no layer does not
    assert reduced < gathered <= 2 * reduced
    assert told["sent"]["all_reduce"] < 64  # loss and norm
