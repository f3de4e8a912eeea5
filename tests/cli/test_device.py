import pytest
import torch

from dbkernels.cli.device import pick_device


@pytest.fixture(params=[False, True])
def has_gpu(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def test_auto_takes_a_gpu_where_there_is_one(has_gpu):
    assert pick_device("auto").type == ("cuda" if has_gpu else "cpu")


def test_a_named_cpu_is_taken_even_beside_a_gpu(has_gpu):
    assert pick_device("cpu") == torch.device("cpu")


def test_cuda_is_never_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device {name} needs an NVIDIA GPU"):
            pick_device(name)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "mps", "meta", ""])
def test_other_names_are_refused(name, has_gpu):
    with pytest.raises(ValueError, match=f"device must be auto, cpu or cuda, got {name}"):
        pick_device(name)


def test_a_gpu_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2 must be below cuda:2 on this machine"):
        pick_device("cuda:2")
