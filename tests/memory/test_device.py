import os
import sys
from types import SimpleNamespace

import pytest
import torch

from dbkernels.memory import device as module
from dbkernels.memory.device import DevicePeak, device_peak, process_bytes

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of stand-ins, whose calls are logged."""
    calls, stats = [], {"num_alloc_retries": 3}
    peaks = {"allocated_bytes": 111, "active_bytes": 112, "reserved_bytes": 222}
    stats |= {f"{name}.all.peak": value for name, value in peaks.items()}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(stats))
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return SimpleNamespace(calls=calls, stats=stats)


def nvml(monkeypatch, processes, error=None):
    """The driver's library: what it says of the processes on GPU-12-34."""

    class NVMLError(Exception):
        pass

    def by_uuid(uuid):
        if error:
            raise NVMLError
        return {"GPU-12-34": "handle"}[uuid]

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)


def test_a_step_alone_is_between_the_reset_and_the_reading(gpu, monkeypatch):
    def step():
        gpu.calls.append("step")
        gpu.stats["num_alloc_retries"] += 2

    monkeypatch.setattr(module, "process_bytes", lambda device: 999)
    assert device_peak(step, GPU) == DevicePeak(111, 112, 222, 2, 999)
    assert gpu.calls == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]


def test_the_driver_is_asked_for_this_process(gpu, monkeypatch):
    nvml(monkeypatch, [(1, 5), (os.getpid(), 7)])
    assert process_bytes(GPU) == 7


@pytest.mark.parametrize("answer", [{"processes": [(1, 5)]}, {"processes": [], "error": True}])
def test_a_driver_that_does_not_tell_is_none(gpu, monkeypatch, answer):
    nvml(monkeypatch, **answer)
    assert process_bytes(GPU) is None


def test_without_its_library_the_driver_is_not_asked(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert process_bytes(GPU) is None
