import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from dbkernels.memory.measure import MEASURED, measure_peak

B, D, FLOAT = 6, 8, 4  # FLOAT: bytes of a float32


def chain(depth):
    """Linear and relu, some layers deep."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(depth)))


class Dropping(nn.Module):
    """Attention and dropout, with or without a checkpoint."""

    def __init__(self, checkpointed):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 4 * D, 0.1, batch_first=True)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.layer, x, use_reentrant=False)
        return self.layer(x)


def train_step(model, optimizer, x, micro_batches=1):
    def step():
        for part in x.chunk(micro_batches):
            (model(part) - part).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def one_parameter(weight):
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return model


# exact bytes


def test_every_byte_of_a_linear_layer_and_its_optimizer():
    model, x = nn.Linear(5, 3), torch.randn(2, 5)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = (5 * 3 + 3) * FLOAT
    expected = {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters + 2 * FLOAT,  # two moments, and a step count per parameter
        "inputs": 2 * 5 * FLOAT,
        "saved_activations": 0,
        "temporaries": 2 * 5 * 3 * FLOAT,  # sqrt of the second moment, and its quotient
    }
    for _ in range(2):  # with the state created in the step, and with the state there before
        peak = measure_peak(step, model=model, optimizers=[optimizer], inputs=[x])
        assert peak.by_category == expected
        assert peak.total_bytes == sum(expected.values())
        assert peak.saved_bytes == 2 * 3 * FLOAT  # the output, for the square; x is an input
        assert peak.at == "optimizer: aten::div.Tensor"
        assert peak.allocated_bytes is None and peak.reserved_bytes is None


def test_what_is_there_before_counts_from_the_start():
    model = nn.BatchNorm1d(5)
    unread = torch.zeros(100)
    model.weight.grad = torch.zeros(5)
    peak = measure_peak(lambda: None, model=model, inputs=[unread])
    buffers = 2 * 5 * FLOAT + 8  # running mean and variance, and an int64 count
    assert peak.at == "start"
    assert peak.by_category == dict(
        zip(MEASURED, (2 * 5 * FLOAT + buffers, 5 * FLOAT, 0, 100 * FLOAT, 0, 0), strict=True)
    )


# gradients


def test_a_gradient_freed_in_the_step_is_still_a_gradient():
    model = one_parameter(torch.ones(1000))

    def step():
        (model.weight * 2).sum().backward()
        model.weight.grad = None

    peak = measure_peak(step, model=model)
    assert peak.by_category["gradients"] == 1000 * FLOAT
    assert peak.total_bytes == (2 * 1000 + 2) * FLOAT  # and the loss, and its gradient
    assert peak.at == "backward: aten::mul.Tensor"


def test_gradients_of_parameters_that_the_step_unfreezes_are_found():
    model = one_parameter(torch.ones(1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(False)

    def step():
        model.requires_grad_(True)
        (model.weight * 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    peak = measure_peak(step, model=model, optimizers=[optimizer])
    assert peak.by_category["gradients"] == 1000 * FLOAT


def test_an_optimizer_step_inside_the_backward_frees_each_gradient():
    model = chain(4)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    x = torch.randn(B, D)
    peak = measure_peak(
        lambda: model(x).sum().backward(), model=model, optimizers=list(optimizers.values())
    )
    # a layer's bias and weight are the most that is there at once
    assert 0 < peak.by_category["gradients"] <= (D * D + D) * FLOAT
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())


def test_ops_after_an_optimizer_step_are_not_the_optimizers():
    model = one_parameter(torch.ones(10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones(10)
    peak = measure_peak(
        lambda: (optimizer.step(), torch.zeros(100)), model=model, optimizers=[optimizer]
    )
    assert peak.at == "forward: aten::zeros"


# leaving no trace


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_numbers_are_those_of_an_unmeasured_step(checkpointed):
    results = []
    model, x = Dropping(checkpointed), torch.randn(2, 5, D)
    for measured in (True, False):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters())
        step = train_step(twin, optimizer, x, micro_batches=2)
        torch.manual_seed(0)
        if measured:
            measure_peak(step, model=twin, optimizers=[optimizer], inputs=[x])
        else:
            step()
        state = [t for s in optimizer.state.values() for t in s.values()]
        results.append([*twin.parameters(), *state, torch.rand(1)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def assert_unhooked(model, optimizer):
    assert _get_current_dispatch_mode() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    y = model(torch.ones(B, D))
    # raises if the tensor was saved under hooks
    y.grad_fn._raw_saved_result.register_hooks(lambda t: t.detach(), lambda t: t)


def test_leaves_no_hook_and_no_mode():
    model = chain(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(model, optimizer, torch.ones(B, D))
    measure_peak(step, model=model, optimizers=[optimizer])
    assert_unhooked(model, optimizer)


def test_leaves_no_hook_and_no_mode_after_a_step_that_fails():
    model = chain(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(torch.ones(B, D))
        raise RuntimeError("the step's own error")

    with pytest.raises(RuntimeError, match="the step's own error"):
        measure_peak(step, model=model, optimizers=[optimizer])
    assert_unhooked(model, optimizer)


def _storages_after_a_measurement():
    """Watches on the storages of a parameter, an input, an activation and a kept output."""
    model, x, kept = chain(2), torch.randn(B, D), []

    def step():
        hidden = model[0](x)
        kept.append(weakref.ref(hidden.untyped_storage()))
        kept.append(model[1](hidden))

    measure_peak(step, model=model, inputs=[x])
    activation, output = kept
    assert activation() is not None, "the graph that the step left should hold it"
    tensors = (model[0][0].weight, x, output)
    return [activation, *(weakref.ref(tensor.untyped_storage()) for tensor in tensors)]


def test_leaves_no_reference():
    gc.collect()
    gc.disable()
    try:
        assert [watch() for watch in _storages_after_a_measurement()] == [None] * 4
    finally:
        gc.enable()


# devices


def test_counts_only_the_named_device():
    model = nn.ModuleList([nn.Linear(D, D, bias=False), nn.Linear(D, 1, bias=False, device="meta")])

    def step():
        torch.zeros(500)
        torch.zeros(100, device="meta")

    peak = measure_peak(step, model=model, device=torch.device("meta"))
    assert peak.total_bytes == (D + 100) * FLOAT


def test_buffers_or_else_inputs_tell_the_device():
    x, buffered = torch.zeros(10), nn.Module()
    buffered.register_buffer("mean", torch.zeros(5))
    assert measure_peak(lambda: None, model=buffered).total_bytes == 5 * FLOAT
    assert measure_peak(lambda: None, model=nn.ReLU(), inputs=[x]).total_bytes == 10 * FLOAT


def test_reports_the_peaks_of_the_cuda_allocator(monkeypatch):
    calls = []
    answers = {"max_memory_allocated": 111, "max_memory_reserved": 222}
    for name in ("synchronize", "reset_peak_memory_stats", *answers):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: calls.append(name) or answers.get(name)
        )
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    with FakeTensorMode():
        model = one_parameter(torch.empty(10, device="cuda"))

        def step():
            calls.append("step")
            torch.empty(100, device="cuda")
            torch.empty(1000, device="cpu")

        peak = measure_peak(step, model=model, device=torch.device("cuda"))
    assert calls[:3] == ["collect", "synchronize", "reset_peak_memory_stats"]
    assert calls[3:5] == ["step", "synchronize"]
    assert (peak.allocated_bytes, peak.reserved_bytes) == (111, 222)
    assert peak.total_bytes == (10 + 100) * FLOAT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(2, 3)}, "inputs must be a sequence of Tensor, got Tensor"),
        ({"inputs": [1.0]}, "inputs must be a sequence of Tensor, got a float in it"),
        (
            {"optimizers": torch.optim.SGD([torch.zeros(1)])},
            "optimizers must be a sequence of Optimizer, got SGD",
        ),
        ({"model": nn.ReLU()}, r"exactly one, .* on \[\]"),
        (
            {"model": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])},
            r"device must be given unless .* on \['cpu', 'meta'\]",
        ),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_peak(lambda: None, **{"model": nn.Linear(1, 1), **arguments})
