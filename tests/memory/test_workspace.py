from types import SimpleNamespace

import pytest
import torch

from dbkernels.memory.workspace import TARGETS, MiB, target_named, target_of

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention_backward.default
OF_A_CPU = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def used(func, shape, dtype=torch.bfloat16, target="h100"):
    q = torch.empty(shape, dtype=dtype, device="meta")
    return TARGETS[target].workspace(func, (q, q, q, q, q), {"scale": None})


@pytest.mark.parametrize(
    "shape, elements",
    [
        ((2, 3, 256, 72), 2 * 3 * 256 * (96 + 1)),  # heads of 72 take 96 lanes
        ((2, 3, 200, 64), 2 * 3 * 256 * (64 + 1)),  # and 200 tokens 256 rows
        ((1, 1, 128, 128), 128 * (128 + 1)),
        ((1, 1, 128, 130), 128 * (192 + 1)),
    ],
)
@pytest.mark.parametrize("func", [FLASH, OF_A_CPU])
def test_flash_attention_adds_up_the_gradient_of_queries_in_float32(func, shape, elements):
    assert used(func, shape) == 4 * elements


@pytest.mark.parametrize("func", [EFFICIENT, OF_A_CPU])
def test_float32_takes_the_memory_efficient_kernel(func):
    assert used(func, (2, 3, 200, 72), torch.float32) == 4 * 2 * 3 * 200 * (72 + 1)


def test_other_ops_and_a_cpu_use_nothing_unseen():
    assert used(aten.mm.default, (2, 3, 256, 72)) == 0
    assert used(OF_A_CPU, (2, 3, 256, 72), target="cpu") == 0
    assert TARGETS["cpu"].resident == []


def test_cublas_has_a_workspace_to_each_of_two_threads():
    for name, cublas in {"a100": 2**23 + 2**17, "h100": 32 * MiB, "b200": 32 * MiB}.items():
        sizes = [size for category, size in TARGETS[name].resident if category == "workspaces"]
        assert sum(sizes) == 2 * (cublas + MiB)


def test_a_target_is_named():
    assert target_named("h100") is TARGETS["h100"]
    with pytest.raises(ValueError, match=r"target must be one of cpu, a100, .*, got v100"):
        target_named("v100")


def test_a_device_of_this_machine_is_a_target(monkeypatch):
    assert target_of(torch.device("cpu")) is TARGETS["cpu"]
    for major, cublas in ((8, 2**23 + 2**17), (9, 32 * MiB), (12, 32 * MiB)):
        card = SimpleNamespace(name="card", major=major, multi_processor_count=77)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        target = target_of(torch.device("cuda"))
        assert (target.name, target.processors, target.cublas) == ("card", 77, cublas)
