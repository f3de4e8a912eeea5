import copy
import gc
import os
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from memory.steps import FLOAT, B, D, chain, one_parameter, train_step, training, transformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dbkernels.memory import measure as module
from dbkernels.memory.allocator import TARGETS, MiB
from dbkernels.memory.measure import MEASURED, measure_peak, predict, record
from dbkernels.memory.tracker import CATEGORIES, START, Event, Trace

GPU = torch.device("cuda", 0)

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
    model.weight.grad = torch.zeros(5)
    peak = measure_peak(lambda: None, model=model, inputs=[torch.zeros(100)])
    buffers = 2 * 5 * FLOAT + 8  # running mean and variance, and an int64 count
    assert peak.at == "start"
    sizes = (2 * 5 * FLOAT + buffers, 5 * FLOAT, 0, 100 * FLOAT, 0, 0)
    assert tuple(map(peak.by_category.get, MEASURED)) == sizes


# gradients


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_gradient_freed_in_the_step_is_still_a_gradient(unfrozen):
    model = one_parameter(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(not unfrozen)

    def step():
        model.requires_grad_(True)
        (model.weight * 2).sum().backward()
        if unfrozen:  # then the optimizer alone tells of it
            optimizer.step()
        model.weight.grad = None

    peak = measure_peak(step, model=model, optimizers=[optimizer])
    assert peak.by_category["gradients"] == 1000 * FLOAT
    assert peak.total_bytes == (2 * 1000 + 2) * FLOAT  # and the loss, and its gradient
    assert peak.at == "backward: aten::mul.Tensor"


def test_an_optimizer_step_inside_the_backward_frees_each_gradient():
    model, x = chain(4), torch.randn(B, D)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    owners = {"model": model, "optimizers": list(optimizers.values())}
    peak = measure_peak(lambda: model(x).sum().backward(), **owners)
    # a layer's bias and weight are the most that is there at once
    assert 0 < peak.by_category["gradients"] <= (D * D + D) * FLOAT
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())


def test_ops_after_an_optimizer_step_are_not_the_optimizers():
    step, owners = training(width=8, batch=1)
    assert measure_peak(lambda: (step(), torch.zeros(999)), **owners).at == "forward: aten::zeros"


# leaving no trace


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_numbers_are_those_of_an_unmeasured_step(checkpointed):
    model, x = transformer(depth=1, width=D, checkpointed=checkpointed), torch.randn(2, 5, D)
    results = []
    for run in (measure_peak, lambda step, **_: step()):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters())
        torch.manual_seed(0)
        step = train_step(twin, optimizer, x, micro_batches=2)
        run(step, model=twin, optimizers=[optimizer])
        state = [t for s in optimizer.state.values() for t in s.values()]
        results.append([*twin.parameters(), *state, torch.rand(1)])
    assert all(map(torch.equal, *results))


def test_leaves_no_hook_and_no_mode_also_where_the_step_fails():
    model, x = chain(2), torch.ones(B, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        train_step(model, optimizer, x)()
        raise RuntimeError("the step's own error")

    with pytest.raises(RuntimeError, match="the step's own error"):
        measure_peak(step, model=model, optimizers=[optimizer])
    assert _get_current_dispatch_mode() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    y = model(x)
    # raises if the tensor was saved under hooks
    y.grad_fn._raw_saved_result.register_hooks(lambda t: t.detach(), lambda t: t)


def _storages_after_a_measurement():
    """Watches on the storages of an activation, a parameter, an input and a kept output."""
    model, x, kept = chain(2), torch.randn(B, D), []

    def step():
        hidden = model.layers[0](x)
        kept.append(weakref.ref(hidden.untyped_storage()))
        kept.append(model.layers[1](hidden))

    measure_peak(step, model=model, inputs=[x])
    activation, output = kept
    assert activation() is not None, "the graph that the step left should hold it"
    tensors = (model.layers[0][0].weight, x, output)
    return [activation, *(weakref.ref(tensor.untyped_storage()) for tensor in tensors)]


def test_leaves_no_reference():
    gc.collect()
    gc.disable()
    try:
        assert [watch() for watch in _storages_after_a_measurement()] == [None] * 4
    finally:
        gc.enable()


# devices


def test_buffers_or_else_inputs_tell_the_device():
    x, buffered = torch.zeros(10), nn.Module()
    buffered.register_buffer("mean", torch.zeros(5))
    assert measure_peak(lambda: None, model=buffered).total_bytes == 5 * FLOAT
    assert measure_peak(lambda: None, model=nn.ReLU(), inputs=[x]).total_bytes == 10 * FLOAT


SGD = torch.optim.SGD([torch.zeros(1)])
TWO = nn.ModuleList(nn.Linear(1, 1, device=device) for device in ("cpu", "meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(2, 3)}, "inputs must be a sequence of Tensor, got Tensor"),
        ({"inputs": [1.0]}, "inputs must be a sequence of Tensor, got a float in it"),
        ({"optimizers": SGD}, "optimizers must be a sequence of Optimizer, got SGD"),
        ({"model": nn.ReLU()}, r"exactly one, .* on \[\]"),
        ({"model": TWO}, r"device must be given unless .* on \['cpu', 'meta'\]"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_peak(lambda: None, **{"model": nn.Linear(1, 1), **arguments})


# what a GPU's allocator and its driver say


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of stand-ins, whose calls are logged."""
    calls = []
    stats = {"num_alloc_retries": 3, "reserved_bytes.all.peak": 222}
    stats |= {"allocated_bytes.all.peak": 111, "active_bytes.all.peak": 112}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(stats))
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return SimpleNamespace(calls=calls, stats=stats)


def test_a_measurement_has_the_peaks_of_the_cuda_allocator(gpu):
    with FakeTensorMode():
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(10, device="cuda"))

        def step():
            gpu.calls.append("step")
            torch.empty(100, device="cuda")
            torch.empty(1000, device="cpu")

        peak = measure_peak(step, model=model, device=torch.device("cuda"))
    reset = ["collect", "synchronize", "reset_peak_memory_stats"]
    assert gpu.calls == [*reset, "step", "synchronize"]
    assert (peak.allocated_bytes, peak.reserved_bytes) == (111, 222)
    assert peak.total_bytes == (10 + 100) * FLOAT


def test_a_gpu_tells_what_a_step_added_and_what_the_driver_counts(gpu, monkeypatch):
    monkeypatch.setattr(module, "process_bytes", lambda device: 999)
    with module.allocator_peak(GPU) as found:
        gpu.stats["num_alloc_retries"] += 2
    peaks = {"allocated_bytes": 111, "active_bytes": 112, "reserved_bytes": 222}
    assert found == {**peaks, "retries": 2, "process_bytes": 999}


@pytest.mark.parametrize(
    "processes, expected",
    [
        ([(1, 5), (os.getpid(), 7)], 7),
        ([(1, 5)], None),
        (RuntimeError, None),  # the driver does not tell
        (None, None),  # its library is not here
    ],
)
def test_the_driver_is_asked_for_this_process(gpu, monkeypatch, processes, expected):
    def running(handle):
        assert handle == "GPU-12-34"
        if processes is RuntimeError:
            raise RuntimeError
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]

    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=lambda: None)
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetComputeRunningProcesses = running
    monkeypatch.setitem(sys.modules, "pynvml", nvml if processes else None)
    assert module.process_bytes(GPU) == expected


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("at alloc.cpp:1 DefaultCPUAllocator: not enough"), "not enough"),
        (RuntimeError("shapes differ"), None),
        (ValueError("DefaultCPUAllocator: not enough"), None),
    ],
)
def test_only_a_lack_of_memory_has_a_sentence(error, sentence):
    assert module.out_of_memory(error) == sentence


# predictions


def predicted_on(name, step, **owners):
    target = TARGETS[name]
    return predict(record(step, **owners, workspace=target.workspace), target)


def test_a_gpu_adds_workspaces_and_rounds_blocks_up():
    events = [Event(START, 0, 5), Event(0, 1, 3 * MiB), Event(0, 1, -3 * MiB)]
    trace = Trace(["forward: a"], events, ["parameters", "temporaries"])
    predicted = predict(trace, TARGETS["h100"])
    sizes = {"parameters": 512, "temporaries": 3 * MiB, "workspaces": 2 * (32 + 1) * MiB}
    assert predicted.by_category == {**dict.fromkeys(CATEGORIES, 0), **sizes}
    # two of cuBLAS, a segment of two small workspaces, one for 5 bytes, and one of 20 MiB
    assert predicted.peak_reserved_bytes == (2 * 32 + 2 + 2 + 20) * MiB
    assert predicted.at == "forward: a"
    assert predicted.blocks.peak().total_bytes == predicted.peak_allocated_bytes


@pytest.mark.parametrize(
    "target, bytes_of_workspaces", [("cpu", 0), ("h100", 2 * (32 + 1) * MiB + 4 * 128 * (32 + 1))]
)
def test_a_workspace_counts_while_its_op_runs(target, bytes_of_workspaces):
    with FakeTensorMode():
        shape = (1, 1, 128, 32)
        qkv = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

        def step():
            for _ in range(2):  # the first workspace is gone when the second comes
                F.scaled_dot_product_attention(*qkv).sum().backward()

        peak = predicted_on(target, step, model=nn.ReLU(), inputs=qkv)
    assert peak.by_category["workspaces"] == bytes_of_workspaces
    op = "backward: aten::_scaled_dot_product_flash_attention_backward"
    assert target == "cpu" or peak.at == op
