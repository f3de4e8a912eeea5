from dataclasses import replace

import pytest
import torch

from dbkernels.models import dit

CPU = torch.device("cpu")
IN_BACKWARD = (False, True)


@pytest.fixture
def made(bench, monkeypatch):
    """Makes trainers of one tiny case, by their ways; the first owns what the others train."""
    tiny = replace(dit.PRESETS["digits"], dim=16, depth=4, num_heads=2)
    monkeypatch.setitem(dit.PRESETS, "tiny", tiny)
    case = bench("training_case").TrainingCase("dit", "tiny", 4, "float32")

    def make(*ways, shared=True):
        trainers = []
        for way in ways:
            owner = trainers[0] if trainers and shared else None
            step = bench("training_step")
            trainers.append(step.make_trainer(case, way, CPU, owner=owner))
        return trainers

    return make


def test_ways_stand_in_the_order_asked_for(bench):
    case = bench("training_case")
    found = case.ways(
        case.METHODS, (1, 3), ("none", "qkv"), (1.0, 0.5), ("none", "cpu"), (False,), ("ops",)
    )
    assert [way.name for way in found] == [
        "end to end in 1 block",
        "compiled in 1 block, budget 1.0",
        "compiled in 1 block, budget 0.5",
        "checkpointed in 1 block",
        "selective in 1 block",
        "block stock in 3 blocks",
        "block fused none in 1 block",
        "block fused qkv in 1 block",
        "block fused none in 3 blocks",
        "block fused qkv in 3 blocks",
        "block fused none in 3 blocks, offload cpu",
        "block fused qkv in 3 blocks, offload cpu",
    ]
    stock = case.ways(("block_stock",), (1,), (), (), (), (False,), ("ops",))
    assert stock == [case.Way("block_stock", 1)]


def test_the_optimizer_is_in_the_backward_where_memory_is_the_aim(bench):
    case = bench("training_case")
    methods = ("end_to_end", "checkpointed", "selective", "compiled", "block_stock", "block_fused")
    every = case.ways(methods, (1, 2), ("qkv",), (1.0,), ("none", "cpu"), (False, True), ("ops",))
    assert [way.name for way in every if way.optimizer_in_backward] == [
        "end to end in 1 block, optimizer in backward",
        "checkpointed in 1 block, optimizer in backward",
        "block fused qkv in 1 block, optimizer in backward",
        "block fused qkv in 2 blocks, offload cpu, optimizer in backward",
    ]
    assert sum(not way.optimizer_in_backward for way in every) == 8


def test_only_fused_layers_are_launched_as_graphs(bench):
    case = bench("training_case")
    every = case.ways(
        ("end_to_end", "block_fused"), (2,), ("qkv",), (), ("none",), (False,), ("ops", "graph")
    )
    assert [(way.method, way.launch) for way in every] == [
        ("end_to_end", "ops"),
        ("block_fused", "ops"),
        ("block_fused", "graph"),
    ]
    config = case.TrainingCase("vit", "digits", 4, "float32").config
    assert [config(way).trainer.cuda_graphs for way in every] == [False, False, True]


def test_ways_train_the_same_parameters_with_the_same_state(bench, made):
    Way = bench("training_case").Way
    trainers = made(Way("end_to_end"), Way("checkpointed"), Way("block_fused", 2, "qkv"))
    first, *others = ({id(p) for p in t.blocks.parameters()} for t in trainers)
    assert all(each == first for each in others)
    moments = [
        {id(t) for group in trainer.groups.values() for t in group.optimizer_tensors().values()}
        for trainer in trainers
    ]
    assert moments[0] == moments[1] == moments[2]
    assert {buffer.device.type for buffer in trainers[2].blocks.buffers()} == {"cpu"}
    assert trainers[2].blocks.model.layers[0].config.recompute == "qkv"


def test_ways_have_the_same_noise_and_loss(bench, made):
    Way = bench("training_case").Way
    ways = [Way("end_to_end"), Way("selective"), Way("block_fused", 1, "none")]
    ways += [Way("end_to_end", optimizer_in_backward=True), Way("block_fused", 1, "layer")]
    rows = [t.step_block(t.blocks[0]) for t in made(*ways, shared=False)]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    norms = [row["grad_norm"] for row in rows]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-4)


def test_ways_with_the_optimizer_in_the_backward_leave_the_others_alone(bench, made):
    Way = bench("training_case").Way
    first, second = made(Way("end_to_end"), Way("end_to_end", optimizer_in_backward=True))
    assert first.blocks.model.head.weight is second.blocks.model.head.weight
    counts = []
    for trainer in (first, second):
        trainer.updater.backward(trainer.blocks.model.head.weight.sum())
        counts.append(sum(p.grad is not None for p in trainer.blocks.parameters()))
        first.blocks.zero_grad()
    assert counts == [1, 0]


def test_steps_take_the_blocks_in_turn(bench, made):
    (trainer,) = made(bench("training_case").Way("block_stock", 3))
    steps = bench("training_step").Steps(trainer)
    steps.sweep()
    steps()
    assert steps.visited == [0, 1, 2, 0]
    assert [trainer.groups[f"block{i}"].steps for i in range(3)] == [2, 1, 1]


def test_policies_of_one_block_with_offload_are_one_trainers(bench, made):
    Way, step = bench("training_case").Way, bench("training_step")
    case = bench("training_case").TrainingCase("dit", "tiny", 4, "float32")
    made(Way("end_to_end"))  # the tiny preset is there now
    ways = [Way("block_fused", 2, recompute, offload="cpu") for recompute in ("none", "layer")]
    steps = {}
    for way in ways:
        steps[way] = step.make_steps(case, way, CPU, steps)
    none, layer = steps.values()
    assert none.trainer is layer.trainer
    policies = []
    for each in (none, layer, none):
        each()
        policies.append({of.config.recompute for of in each.trainer.blocks.model.layers})
    assert policies == [{"none"}, {"layer"}, {"none"}]


def test_a_step_finds_another_block_on_the_device_than_its_own(bench, made):
    step, Way = bench("training_step"), bench("training_case").Way
    (trainer,) = made(Way("block_fused", 2, "none", offload="cpu"))
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


def test_what_is_prepared_before_a_call_takes_no_time(bench, monkeypatch):
    measure, clock = bench("measure"), [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "WARM_UP_MS", {"cpu": 0})

    class Prepared:
        def prepare(self):
            clock[0] += 5

        def __call__(self):
            clock[0] += 0.001

    times = measure.interleaved({"a": Prepared()}, device=CPU, rounds=2)
    assert times["a"].median_ms == pytest.approx(1.0)


def test_a_time_is_averaged_over_the_blocks_medians(bench):
    times = bench("training_step").step_times([1, 10, 2, 20, 9, 30], [0, 1, 0, 1, 0, 1])
    assert (times["step_ms"], times["sweep_ms"]) == (11, 22)
    assert times["p20_ms"] == pytest.approx((1.4 + 14) / 2)
    assert times["p80_ms"] == pytest.approx((6.2 + 26) / 2)


def test_only_what_does_not_move_parameters_shares_them(bench):
    shares, Way = bench("training_step").shares, bench("training_case").Way
    assert shares(Way("end_to_end")) and shares(
        Way("block_fused", 3, "none", optimizer_in_backward=True)
    )
    assert not shares(Way("block_fused", 3, "none", offload="cpu"))


def test_no_step_with_the_optimizer_after_the_backward_calls_a_hook(bench, made):
    Way = bench("training_case").Way
    case = bench("training_case").TrainingCase("dit", "tiny", 4, "float32")
    made(Way("end_to_end"))  # the tiny preset is there now
    ways = [
        Way(name, optimizer_in_backward=each)
        for name in ("end_to_end", "checkpointed")
        for each in IN_BACKWARD
    ]
    steps = {}
    for way in ways:
        steps[way] = bench("training_step").make_steps(case, way, CPU, steps)
    weights = [each.trainer.blocks.model.head.weight for each in steps.values()]
    assert weights[0] is weights[2] and weights[1] is weights[3]
    hooks = [weight._post_accumulate_grad_hooks for weight in weights]
    assert not hooks[0] and len(hooks[1]) == 2


def test_ways_with_offload_are_timed_apart_by_their_number_of_blocks(bench):
    Way = bench("training_case").Way
    every = [Way("end_to_end"), Way("block_fused", 2, "none")]
    apart = [Way("block_fused", n, "none", offload="cpu") for n in (2, 3, 2)]
    groups = bench("training_rows")._groups([*every, *apart])
    assert groups == [every, [apart[0], apart[2]], [apart[1]]]


def test_what_runs_a_ways_layers_is_named(bench, monkeypatch):
    layer_case, Way = bench("layer_case"), bench("training_case").Way
    monkeypatch.setattr(layer_case, "implementation", lambda device, op: "cpp")
    names = [Way(m).implementation(CPU) for m in ("block_fused", "compiled", "block_stock")]
    assert names == ["cpp", "inductor", "torch"]
