"""What is counted, to the byte, and against the CPU allocator's own events, which no mode feeds."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from memory.steps import FLOAT, B, D, allocator_peak, chain, one_parameter, train_step, transformer
from torch import nn

from dbkernels.memory.measure import measure_peak
from dbkernels.memory.tracker import CATEGORIES, START, Event, Moment, Trace, Tracker

CPU = torch.device("cpu")


def peak_of(step, model=None, **owners):
    return measure_peak(step, model=model or one_parameter(), **owners)


# a trace


def trace():
    events = [Event(START, 0, 100), Event(0, 1, 50), Event(1, 1, -50), Event(1, 2, 50)]
    categories = ["parameters", "temporaries", "temporaries"]
    return Trace(["forward: a", "backward: b"], events, categories)


def moment(op, **sizes):
    return Moment(op, dict.fromkeys(CATEGORIES, 0) | sizes)


def test_every_event_has_a_moment_and_the_peak_is_the_first_of_the_highest():
    assert list(trace().moments()) == [
        moment(START, parameters=100),
        moment(0, parameters=100, temporaries=50),
        moment(1, parameters=100),
        moment(1, parameters=100, temporaries=50),
    ]
    assert trace().peak() == moment(0, parameters=100, temporaries=50)
    assert [trace().name(op) for op in (START, 0, 1)] == ["start", "forward: a", "backward: b"]
    assert Trace([], [], []).peak() == moment(START)
    # what stands beside a run is there at its peak
    peak = trace().beside([("optimizer", 30), ("parameters", 5)]).peak()
    assert peak == moment(0, parameters=105, optimizer=30, temporaries=50)


# storages


def test_parameters_that_share_a_storage_count_it_once():
    tied = nn.ModuleList([nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)])
    tied[1].weight = tied[0].weight
    views, flat = nn.Module(), torch.zeros(100)
    views.a, views.b = nn.Parameter(flat[:10]), nn.Parameter(flat[20:30])
    for model, floats in ((tied, D * D), (views, 100)):
        assert peak_of(lambda: None, model).total_bytes == floats * FLOAT


def grown_unseen():
    x = torch.zeros(10)
    torch.zeros(2000)
    x.untyped_storage().resize_(1000 * FLOAT)
    x.sum()


BEFORE = torch.zeros(50)


@pytest.mark.parametrize(
    "step, floats, inputs, op",
    [
        # the first is gone before the peak
        (lambda: [torch.zeros(count) is None for count in (1000, 2000)], 2000, 0, "zeros"),
        (lambda: (torch.zeros(1000), torch.zeros(2000)[:1]), 3000, 0, "zeros"),
        (lambda: torch.zeros(10).resize_(500), 500, 0, "resize_"),
        (grown_unseen, 10 + 2000, 0, "zeros"),  # found by the op that comes after the peak
        (lambda: torch.tensor([1.0, 2.0]) * 2, 2 * 2, 0, "mul.Tensor"),
        # what the step reads counts from the start
        (lambda: (torch.zeros(200) is None, BEFORE.sum()), 200, 50, "zeros"),
        # of two equal peaks the first is named
        (lambda: [make(100) is None for make in (torch.zeros, torch.ones)], 100, 0, "zeros"),
    ],
)
def test_a_temporary_counts_while_it_is_alive(step, floats, inputs, op):
    peak = peak_of(step)
    assert peak.by_category["temporaries"] == floats * FLOAT
    assert peak.by_category["inputs"] == inputs * FLOAT
    assert peak.total_bytes == (floats + inputs + 10) * FLOAT
    assert peak.at == f"forward: aten::{op}"


def test_sparse_gradients_are_passed_over():
    model, rows = nn.Embedding(10, D, sparse=True), torch.tensor([1, 2])
    peak = peak_of(lambda: model(rows).sum().backward(), model, inputs=[rows])
    assert model.weight.grad.is_sparse and peak.by_category["gradients"] == 0


# saved for the backward


def backward(model, x, graphs=1):
    sum(model(x) for _ in range(graphs)).sum().backward()


def cast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.sum().backward()


@pytest.mark.parametrize(
    "model, step, floats",
    [
        (chain(4), backward, 4 * B * D),  # the relu's and the next linear's are one storage
        (chain(3), lambda model, x: backward(model, x, graphs=2), 2 * 3 * B * D),
        (chain(3), lambda model, x: [backward(model, x) for _ in range(2)], 3 * B * D),
        # relu returns its result from each layer; the first layer's input is an input
        (chain(4, checkpointed=True), backward, 3 * B * D),
        (nn.Linear(D, D, bias=False), cast, (D * D + B * D) // 2),  # copies, also of the weight
        # a view counts as its storage, and parameters and what was there before do not
        (one_parameter(50), lambda model, _: (model.weight * 2)[:1].square().sum().backward(), 50),
        (one_parameter(50), lambda model, _: (model.weight * BEFORE).sum().backward(), 0),
    ],
)
def test_saved_bytes_are_those_of_storages_that_the_backward_holds(model, step, floats):
    x = torch.randn(B, D, requires_grad=True)
    peak = peak_of(lambda: step(model, x), model, inputs=[x])
    assert peak.saved_bytes == floats * FLOAT
    assert floats or peak.by_category["saved_activations"] == 0


# leaving no trace


def test_stops_watching_when_left(monkeypatch):
    failures = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    with Tracker(CPU) as tracker:
        x = torch.zeros(10)
    before = tracker.events.copy()
    del x
    assert tracker.events == before and not failures


def test_a_graph_that_outlives_the_measurement_still_has_its_backward():
    model, x, kept = chain(2), torch.randn(B, D), []
    peak_of(lambda: kept.append(model(x).sum()), model)
    losses, parameters = (kept[0], model(x).sum()), list(model.parameters())
    found = [torch.autograd.grad(loss, parameters) for loss in losses]
    assert all(map(torch.equal, *found))


# against the allocator


def assert_agrees_with_the_allocator(step, model, optimizers=(), inputs=()):
    state = [t for optimizer in optimizers for s in optimizer.state.values() for t in s.values()]
    resident = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *state, *inputs))
    allocated = resident + allocator_peak(step)
    peak = peak_of(step, model, optimizers=optimizers, inputs=inputs)
    assert abs(peak.total_bytes - allocated) <= 0.005 * allocated
    return peak


ADAMS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


@pytest.mark.parametrize(
    "checkpointed, adam, how",
    [
        *itertools.product([False, True], ADAMS, [{}]),
        (False, {"fused": True}, {"micro_batches": 4}),
        (False, {"fused": True}, {"autocast": True}),
    ],
    ids=str,
)
def test_agrees_with_the_allocator_on_a_transformer_step(checkpointed, adam, how):
    model, x = transformer(checkpointed=checkpointed), torch.randn(8, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), **adam)
    step = train_step(model, optimizer, x, **how)
    step()
    assert_agrees_with_the_allocator(step, model, [optimizer], [x])


class _AddsOutOfPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return dy * 2 + dy.sum()


def two_uses(weight):
    return (weight * 2).sum() + (weight * 3).sum()


def one_is_kept(weight, more=0):
    kept, first, second = [], (weight * 2).sum(), weight.view_as(weight)
    # the later node is the first in the backward, and its gradient is somebody else's too
    second.register_hook(lambda dy: kept.append(dy * 2) or kept[0])
    (first + second.sum()).backward()
    if not more:
        weight.grad = None
    held = torch.zeros(more)
    kept.clear()
    return held


@torch.no_grad()
def added_outside_a_backward(weight):
    torch.zeros(1000) + torch.ones(1)


@pytest.mark.parametrize(
    "use, thousands",
    [
        # the parameter and its two gradients, and no third
        (lambda weight: two_uses(weight).backward(), 3),
        (lambda weight: torch.autograd.grad(two_uses(weight), weight, create_graph=True)[:0], 4),
        (one_is_kept, 4),
        (lambda weight: one_is_kept(weight, more=2000), 5),
        (lambda weight: _AddsOutOfPlace.apply(weight).sum().backward(), 3),
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
QKV = [torch.ones(2, 3, 5, D, requires_grad=True) for _ in range(3)]
OF_ATTENTION = 2 * 2 * 3 * 5 * 5 * D


@pytest.mark.parametrize(
    "step, flops",
    [
        (lambda: LEFT @ RIGHT, MATMUL),
        (lambda: torch.addmm(ADD, LEFT, RIGHT), MATMUL),
        (lambda: ADD.clone().addmm_(LEFT, RIGHT), MATMUL),
        (lambda: torch.ops.aten._addmm_activation(torch.ones(5), LEFT, RIGHT), MATMUL),
        (lambda: torch.ones(100).exp().sum(), 0),
        # two matmuls, and five in the backward
        (lambda: F.scaled_dot_product_attention(*QKV), 2 * OF_ATTENTION),
        (lambda: F.scaled_dot_product_attention(*QKV).sum().backward(), 7 * OF_ATTENTION),
    ],
)
def test_a_matmul_takes_two_operations_for_each_product(step, flops):
    with Tracker(CPU) as tracker:
        step()
    assert tracker.flops == flops
