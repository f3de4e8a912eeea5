from dataclasses import replace

import pytest


def test_all_parts_together_take_less_than_eight_minutes_and_each_less_than_its_limit(bench):
    module = bench("gpu_time")
    found, limits = module.seconds(), bench("gpu_jobs").LIMITS
    assert found.keys() == limits.keys()
    assert sum(found.values()) < 480
    for part, seconds in found.items():
        assert 0 < seconds < limits[part]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("TRITON", 20.0, "kernels"),
        ("FLOPS", 1.0e13, "headline"),
        ("NVCC", 200.0, "smoke"),
        ("PREDICTION", 100.0, "rest"),
    ],
)
def test_what_takes_longer_makes_its_part_longer(bench, monkeypatch, name, value, part):
    module = bench("gpu_time")
    before = module.seconds()[part]
    monkeypatch.setattr(module, name, value)
    assert module.seconds()[part] > before + 10


def test_more_rounds_and_kernels_are_counted(bench, monkeypatch):
    module = bench("gpu_time")
    before = module.seconds()
    wider = replace(module.GPU, rounds=48, widths=(384, 768, 1024, 1152, 1536))
    monkeypatch.setattr(module, "GPU", wider)
    after = module.seconds()
    assert after["headline"] > before["headline"] and after["kernels"] > before["kernels"]
    assert after["smoke"] == before["smoke"]


def test_the_parts_asked_for_are_printed(bench, capsys):
    bench("gpu_time").main(["smoke"])
    printed = capsys.readouterr().out
    assert "smoke: about" in printed and "headline" not in printed and "estimated" in printed
