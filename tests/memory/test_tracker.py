import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dbkernels.memory.measure import measure_peak
from dbkernels.memory.tracker import Tracker

B, D, FLOAT = 6, 8, 4  # FLOAT: bytes of a float32


def one_parameter(weight):
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return model


class Chain(nn.Module):
    """Linear and relu, some layers deep; one (B, D) storage saved per layer."""

    def __init__(self, depth, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        self.checkpointed = checkpointed

    def layer(self, linear, x):
        return F.relu(linear(x))

    def forward(self, x):
        for linear in self.layers:
            if self.checkpointed:
                x = checkpoint(self.layer, linear, x, use_reentrant=False)
            else:
                x = self.layer(linear, x)
        return x


def test_tied_parameters_count_once():
    model = nn.ModuleList([nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)])
    model[1].weight = model[0].weight
    assert measure_peak(lambda: None, model=model).total_bytes == D * D * FLOAT


def test_parameters_that_are_views_count_their_storage_once():
    model, flat = nn.Module(), torch.zeros(100)
    model.a, model.b = nn.Parameter(flat[:10]), nn.Parameter(flat[20:30])
    assert measure_peak(lambda: None, model=model).total_bytes == 100 * FLOAT


def test_a_temporary_that_dies_before_the_peak_does_not_count():
    def apart():
        torch.zeros(1000)
        torch.zeros(2000)

    def together():
        return torch.zeros(1000), torch.zeros(2000)[:1]

    for step, floats in ((apart, 2000), (together, 3000)):
        peak = measure_peak(step, model=one_parameter(torch.ones(10)))
        assert peak.by_category["temporaries"] == floats * FLOAT
        assert peak.total_bytes == (floats + 10) * FLOAT
        assert peak.at == "forward: aten::zeros"


def test_a_storage_that_grows_counts_its_new_size():
    peak = measure_peak(lambda: torch.zeros(10).resize_(500), model=one_parameter(torch.ones(10)))
    assert peak.total_bytes == (10 + 500) * FLOAT


def test_a_storage_that_grows_unseen_counts_from_the_op_that_finds_it():
    def step():
        x = torch.zeros(10)
        torch.zeros(2000)
        x.untyped_storage().resize_(1000 * FLOAT)
        x.sum()

    peak = measure_peak(step, model=one_parameter(torch.ones(10)))
    assert peak.total_bytes == (10 + 10 + 2000) * FLOAT


def test_of_two_equal_peaks_the_first_is_named():
    def step():
        torch.zeros(100)
        torch.ones(100)

    peak = measure_peak(step, model=one_parameter(torch.ones(10)))
    assert peak.at == "forward: aten::zeros"


def test_sparse_gradients_are_passed_over():
    model, rows = nn.Embedding(10, D, sparse=True), torch.tensor([1, 2])
    peak = measure_peak(lambda: model(rows).sum().backward(), model=model, inputs=[rows])
    assert model.weight.grad.is_sparse and peak.by_category["gradients"] == 0


def test_a_tensor_from_before_that_the_step_reads_counts_from_the_start():
    model, captured = one_parameter(torch.ones(10)), torch.zeros(50)

    def step():
        torch.zeros(200)
        captured.sum()

    peak = measure_peak(step, model=model)
    assert peak.by_category["inputs"] == 50 * FLOAT
    assert peak.by_category["temporaries"] == 200 * FLOAT


def test_a_tensor_made_of_numbers_in_the_step_is_no_input():
    peak = measure_peak(lambda: torch.tensor([1.0, 2.0]) * 2, model=one_parameter(torch.ones(10)))
    assert peak.by_category["inputs"] == 0
    assert peak.by_category["temporaries"] == 2 * 2 * FLOAT


def test_a_storage_saved_twice_counts_once():
    model, x = Chain(2), torch.randn(B, D)
    # the first relu's output is saved by the relu and as the second linear's input
    peak = measure_peak(lambda: model(x).sum().backward(), model=model, inputs=[x])
    assert peak.saved_bytes == 2 * B * D * FLOAT


def test_a_saved_view_counts_as_its_storage():
    model = one_parameter(torch.ones(1000))
    peak = measure_peak(lambda: (model.weight * 2)[:1].square().sum().backward(), model=model)
    assert peak.saved_bytes == 1000 * FLOAT


def test_parameters_and_inputs_are_no_saved_activations():
    model, x = one_parameter(torch.ones(1000)), torch.ones(1000)
    peak = measure_peak(lambda: (model.weight * x).sum().backward(), model=model)
    assert peak.saved_bytes == 0 and peak.by_category["saved_activations"] == 0


def test_saved_bytes_fall_as_the_backward_lets_go():
    model, x = Chain(3), torch.randn(B, D)

    def step():
        for _ in range(2):
            model(x).sum().backward()

    once = measure_peak(lambda: model(x).sum().backward(), model=model, inputs=[x])
    assert measure_peak(step, model=model, inputs=[x]).saved_bytes == once.saved_bytes


def test_graphs_alive_together_add_their_saved_bytes():
    model, x = Chain(3), torch.randn(B, D)
    peak = measure_peak(lambda: (model(x) + model(x)).sum().backward(), model=model, inputs=[x])
    assert peak.saved_bytes == 2 * 3 * B * D * FLOAT


def test_half_the_layers_save_half():
    x = torch.randn(B, D)
    saved = {}
    for depth in (4, 8):
        model = Chain(depth)
        peak = measure_peak(lambda m=model: m(x).sum().backward(), model=model, inputs=[x])
        saved[depth] = peak.saved_bytes
    assert saved == {4: 4 * B * D * FLOAT, 8: 8 * B * D * FLOAT}


def test_checkpointing_saves_the_layers_inputs_only():
    x = torch.randn(B, D)
    model = Chain(4, checkpointed=True)
    # relu returns its result from each layer; the first layer's input is an input
    peak = measure_peak(lambda: model(x).sum().backward(), model=model, inputs=[x])
    assert peak.saved_bytes == 3 * B * D * FLOAT


def test_autocast_copies_of_weights_are_saved_activations():
    model, x = nn.Linear(D, D, bias=False), torch.randn(B, D, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.sum().backward()

    peak = measure_peak(step, model=model, inputs=[x])
    assert peak.saved_bytes == (D * D + B * D) * FLOAT // 2  # bfloat16 weight and input


def test_fake_tensors_have_the_peak_of_real_ones():
    def peak():
        model, x = Chain(3), torch.ones(B, D)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return measure_peak(step, model=model, optimizers=[optimizer], inputs=[x])

    real = peak()
    with FakeTensorMode():
        assert peak() == real


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
    measure_peak(lambda: kept.append(model(x).sum()), model=model)
    measured, unmeasured = (
        torch.autograd.grad(loss, list(model.parameters())) for loss in (kept[0], model(x).sum())
    )
    assert all(map(torch.equal, measured, unmeasured))
