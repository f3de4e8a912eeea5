import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.measure import measure_peak
from dbkernels.memory.predict import predict, predict_peak
from dbkernels.memory.trace import CATEGORIES, START, Event, Trace
from dbkernels.memory.workspace import TARGETS, MiB

PARAMETERS, TEMPORARIES = CATEGORIES.index("parameters"), CATEGORIES.index("temporaries")


def stepped(batch):
    """A network, its optimizer with its state, and one more step of it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.ones(batch, 8)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step, {"model": model, "optimizers": [optimizer], "inputs": [x]}


def test_on_a_cpu_it_is_what_a_real_step_is_measured_to_take():
    step, owners = stepped(32)
    measured = measure_peak(step, **owners)
    with FakeTensorMode():
        step, owners = stepped(32)
        predicted = predict_peak(step, **owners, target=TARGETS["cpu"])
    assert predicted.peak_allocated_bytes == measured.total_bytes
    assert predicted.peak_reserved_bytes == measured.total_bytes
    assert predicted.by_category == {**measured.by_category, "workspaces": 0}
    assert predicted.saved_bytes == measured.saved_bytes
    assert predicted.at == measured.at
    assert predicted.placement is None
    assert predicted.flops == 2 * 32 * (2 * 8 * 16 + 3 * 16 * 4)  # x needs no gradient


def test_nothing_is_computed_nor_allocated():
    with FakeTensorMode():
        x = torch.empty(2**50)
        peak = predict_peak(lambda: x * 2, model=nn.ReLU(), inputs=[x], target=TARGETS["cpu"])
    assert peak.peak_allocated_bytes == 2 * 4 * 2**50


def test_a_gpu_adds_workspaces_and_rounds_blocks_up():
    events = [Event(START, 0, 5), Event(0, 1, 3 * MiB), Event(0, 1, -3 * MiB)]
    predicted = predict(Trace(["forward: a"], events, [PARAMETERS, TEMPORARIES]), TARGETS["h100"])
    assert predicted.by_category["parameters"] == 512
    assert predicted.by_category["temporaries"] == 3 * MiB
    assert predicted.by_category["workspaces"] == 2 * (32 + 1) * MiB
    assert predicted.peak_allocated_bytes == sum(predicted.by_category.values())
    # two of cuBLAS, a segment of two small workspaces, one for 5 bytes, and one of 20 MiB
    assert predicted.peak_reserved_bytes == (2 * 32 + 2 + 2 + 20) * MiB
    assert predicted.at == "forward: a"
    assert predicted.blocks.peak().total_bytes == predicted.peak_allocated_bytes


def test_a_workspace_counts_while_its_op_runs():
    q = (1, 1, 128, 32)
    with FakeTensorMode():
        tensors = [torch.empty(q, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

        def step():
            F.scaled_dot_product_attention(*tensors).sum().backward()

        peaks = {
            name: predict_peak(step, model=nn.ReLU(), inputs=tensors, target=TARGETS[name])
            for name in ("cpu", "h100")
        }
    assert peaks["h100"].at == "backward: aten::_scaled_dot_product_flash_attention_backward"
    resident = 2 * (32 + 1) * MiB
    assert peaks["h100"].by_category["workspaces"] == resident + 4 * 128 * (32 + 1)
    assert peaks["cpu"].by_category["workspaces"] == 0


def test_rejects_what_a_measurement_rejects():
    with pytest.raises(ValueError, match="inputs must be a sequence of Tensor, got Tensor"):
        predict_peak(lambda: None, model=nn.ReLU(), inputs=torch.ones(2), target=TARGETS["cpu"])
