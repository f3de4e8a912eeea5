"""What is counted, to the byte, and against the CPU allocator's own events, which no mode feeds."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from memory.steps import FLOAT, B, Chain, D, Transformer, one_parameter, train_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dbkernels.memory.measure import measure_peak
from dbkernels.memory.tracker import CATEGORIES, START, Event, Moment, Trace, Tracker

PARAMETERS, TEMPORARIES = CATEGORIES.index("parameters"), CATEGORIES.index("temporaries")


def peak_of(step, model=None, **owners):
    return measure_peak(step, model=one_parameter() if model is None else model, **owners)


# a trace


def trace():
    events = [Event(START, 0, 100), Event(0, 1, 50), Event(1, 1, -50), Event(1, 2, 50)]
    return Trace(["forward: a", "backward: b"], events, [PARAMETERS, TEMPORARIES, TEMPORARIES])


def by_category(**sizes):
    return tuple(sizes.get(name, 0) for name in CATEGORIES)


def test_every_event_has_a_moment_and_the_peak_is_the_first_of_the_highest():
    totals = [(moment.total_bytes, moment.op) for moment in trace().moments()]
    assert totals == [(100, START), (150, 0), (100, 1), (150, 1)]
    assert trace().peak() == Moment(150, by_category(parameters=100, temporaries=50), 0)
    assert [trace().name(op) for op in (START, 0, 1)] == ["start", "forward: a", "backward: b"]


def test_a_run_without_events_has_a_peak_of_nothing():
    assert Trace([], [], []).peak() == Moment(0, by_category(), START)


def test_what_stands_beside_a_run_is_there_at_its_peak():
    peak = trace().beside([("optimizer", 30), ("parameters", 5)]).peak()
    assert peak == Moment(185, by_category(parameters=105, optimizer=30, temporaries=50), 0)
    assert trace().peak().total_bytes == 150


# storages


def test_parameters_that_share_a_storage_count_it_once():
    tied = nn.ModuleList([nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)])
    tied[1].weight = tied[0].weight
    views, flat = nn.Module(), torch.zeros(100)
    views.a, views.b = nn.Parameter(flat[:10]), nn.Parameter(flat[20:30])
    for model, floats in ((tied, D * D), (views, 100)):
        assert peak_of(lambda: None, model).total_bytes == floats * FLOAT


def apart():
    torch.zeros(1000)
    torch.zeros(2000)


def together():
    return torch.zeros(1000), torch.zeros(2000)[:1]


def grown_unseen():
    x = torch.zeros(10)
    torch.zeros(2000)
    x.untyped_storage().resize_(1000 * FLOAT)
    x.sum()


@pytest.mark.parametrize(
    "step, floats",
    [
        (apart, 2000),  # the first is gone before the peak
        (together, 3000),
        (lambda: torch.zeros(10).resize_(500), 500),
        (grown_unseen, 10 + 2000),  # found by the op that comes after the peak
        (lambda: torch.tensor([1.0, 2.0]) * 2, 2 * 2),
    ],
)
def test_a_temporary_counts_while_it_is_alive(step, floats):
    peak = peak_of(step)
    assert peak.by_category["temporaries"] == floats * FLOAT
    assert peak.by_category["inputs"] == 0
    assert peak.total_bytes == (floats + 10) * FLOAT


def test_of_two_equal_peaks_the_first_is_named():
    def step():
        torch.zeros(100)
        torch.ones(100)

    assert peak_of(step).at == "forward: aten::zeros"


def test_sparse_gradients_are_passed_over():
    model, rows = nn.Embedding(10, D, sparse=True), torch.tensor([1, 2])
    peak = peak_of(lambda: model(rows).sum().backward(), model, inputs=[rows])
    assert model.weight.grad.is_sparse and peak.by_category["gradients"] == 0


def test_a_tensor_from_before_that_the_step_reads_counts_from_the_start():
    captured = torch.zeros(50)

    def step():
        torch.zeros(200)
        captured.sum()

    peak = peak_of(step)
    assert peak.by_category["inputs"] == 50 * FLOAT
    assert peak.by_category["temporaries"] == 200 * FLOAT


# saved for the backward


@pytest.mark.parametrize(
    "model, times, floats",
    [
        (Chain(2), 1, 2 * B * D),  # the relu's and the next linear's are one storage
        (Chain(4), 1, 4 * B * D),
        (Chain(8), 1, 8 * B * D),
        (Chain(3), 2, 2 * 3 * B * D),  # graphs that are alive together
        # relu returns its result from each layer; the first layer's input is an input
        (Chain(4, checkpointed=True), 1, 3 * B * D),
    ],
)
def test_saved_bytes_are_those_of_storages_that_the_backward_holds(model, times, floats):
    x = torch.randn(B, D)
    peak = peak_of(lambda: sum(model(x) for _ in range(times)).sum().backward(), model, inputs=[x])
    assert peak.saved_bytes == floats * FLOAT


def test_saved_bytes_fall_as_the_backward_lets_go():
    model, x = Chain(3), torch.randn(B, D)
    once, twice = (
        peak_of(lambda n=n: [model(x).sum().backward() for _ in range(n)], model, inputs=[x])
        for n in (1, 2)
    )
    assert once.saved_bytes == twice.saved_bytes


def test_a_saved_view_counts_as_its_storage_and_parameters_and_inputs_do_not():
    model, x = one_parameter(1000), torch.ones(1000)
    peak = peak_of(lambda: (model.weight * 2)[:1].square().sum().backward(), model)
    assert peak.saved_bytes == 1000 * FLOAT
    peak = peak_of(lambda: (model.weight * x).sum().backward(), model)
    assert peak.saved_bytes == 0 and peak.by_category["saved_activations"] == 0


def test_autocast_copies_of_weights_are_saved_activations():
    model, x = nn.Linear(D, D, bias=False), torch.randn(B, D, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.sum().backward()

    assert peak_of(step, model, inputs=[x]).saved_bytes == (D * D + B * D) * FLOAT // 2


# leaving no trace


def test_stops_watching_when_left(monkeypatch):
    failures = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    with Tracker(torch.device("cpu")) as tracker:
        x = torch.zeros(10)
    before = tracker.events.copy()
    del x
    assert tracker.events == before and not failures


def test_a_graph_that_outlives_the_measurement_still_has_its_backward():
    model, x, kept = Chain(2), torch.randn(B, D), []
    peak_of(lambda: kept.append(model(x).sum()), model)
    measured, unmeasured = (
        torch.autograd.grad(loss, list(model.parameters())) for loss in (kept[0], model(x).sum())
    )
    assert all(map(torch.equal, measured, unmeasured))


# against the allocator


def allocator_peak(step):
    """Highest growth over the start, from the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    deltas = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(deltas, initial=0))


def assert_agrees_with_the_allocator(step, model, optimizers=(), inputs=()):
    state = [t for optimizer in optimizers for s in optimizer.state.values() for t in s.values()]
    resident = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *state, *inputs))
    allocated = resident + allocator_peak(step)
    peak = peak_of(step, model, optimizers=optimizers, inputs=inputs)
    assert abs(peak.total_bytes - allocated) <= 0.005 * allocated
    return peak


@pytest.mark.parametrize(
    "checkpointed, adam, how",
    [
        *itertools.product(
            [False, True], [{"fused": True}, {"foreach": True}, {"foreach": False}], [{}]
        ),
        (False, {"fused": True}, {"micro_batches": 4}),
        (False, {"fused": True}, {"autocast": True}),
    ],
    ids=str,
)
def test_agrees_with_the_allocator_on_a_transformer_step(checkpointed, adam, how):
    model, x = Transformer(checkpointed=checkpointed), torch.randn(8, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), **adam)
    step = train_step(model, optimizer, x, **how)
    step()
    assert_agrees_with_the_allocator(step, model, [optimizer], [x])


class _Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        ctx.kept.append(dy * 2)
        return ctx.kept[0], None


class _AddsOutOfPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        dx = dy * 2
        dx = dx + dy.sum()
        return dx


def two_uses(weight):
    ((weight * 2).sum() + (weight * 3).sum()).backward()


def two_uses_with_a_graph(weight):
    loss = (weight * 2).sum() + (weight * 3).sum()
    torch.autograd.grad(loss, weight, create_graph=True)


def one_is_kept(weight):
    kept = []
    # the later node is the first in the backward
    ((weight * 2).sum() + _Keeps.apply(weight, kept).sum()).backward()
    weight.grad = None
    kept.clear()


def one_is_kept_beside_more(weight):
    kept = []
    ((weight * 2).sum() + _Keeps.apply(weight, kept).sum()).backward()
    held = torch.zeros(2000)
    kept.clear()
    return held


def added_by_a_backward(weight):
    _AddsOutOfPlace.apply(weight).sum().backward()


@torch.no_grad()
def added_outside_a_backward(weight):
    torch.zeros(1000) + torch.ones(1)


@pytest.mark.parametrize(
    "use, thousands",
    [
        (two_uses, 3),  # the parameter and its two gradients, and no third
        (two_uses_with_a_graph, 4),
        (one_is_kept, 4),
        (one_is_kept_beside_more, 5),
        (added_by_a_backward, 3),
        (added_outside_a_backward, 3),
    ],
)
def test_gradients_are_added_in_place_where_the_engine_does(use, thousands):
    model = one_parameter(1000)

    def step():
        held = use(model.weight)
        model.weight.grad = None
        return held

    peak = assert_agrees_with_the_allocator(step, model)
    assert peak.total_bytes // (1000 * FLOAT) == thousands


# operations

ADD, LEFT, RIGHT = torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 5)
MATMUL = 2 * 2 * 3 * 5


def counted(step):
    with Tracker(torch.device("cpu")) as tracker:
        step()
    return tracker.flops


@pytest.mark.parametrize(
    "step, flops",
    [
        (lambda: LEFT @ RIGHT, MATMUL),
        (lambda: torch.addmm(ADD, LEFT, RIGHT), MATMUL),
        (lambda: ADD.clone().addmm_(LEFT, RIGHT), MATMUL),
        (lambda: torch.ops.aten._addmm_activation(torch.ones(5), LEFT, RIGHT), MATMUL),
        (lambda: torch.ones(100).exp().sum(), 0),
    ],
)
def test_a_matmul_takes_two_operations_for_each_product(step, flops):
    assert counted(step) == flops


def test_attention_counts_two_matmuls_and_five_in_its_backward():
    q, k, v = (torch.ones(2, 3, 5, D, requires_grad=True) for _ in range(3))
    matmul = 2 * 2 * 3 * 5 * 5 * D
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * matmul
    step = F.scaled_dot_product_attention(q, k, v).sum()
    assert counted(step.backward) == 5 * matmul


def test_operations_of_a_network_are_torchs_own_and_those_of_fake_tensors():
    def step():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        model(torch.ones(3, 8)).sum().backward()

    with FlopCounterMode(display=False) as expected:
        step()
    assert counted(step) == expected.get_total_flops() > 0
    with FakeTensorMode():
        assert counted(step) == expected.get_total_flops()
