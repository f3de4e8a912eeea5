from functools import partial

import pytest
from cli.plans import MiB, in_turn, reckoned

import dbkernels.cli.plan_search as module
from dbkernels.cli.plan_search import Question, answer
from dbkernels.training.estimate import Setting


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.setattr(module, "estimate", reckoned)
    monkeypatch.setattr(module, "_run", in_turn)

    def asked(memory, preset="digits", target="cpu", family="dit", autocast=False):
        calls = []
        question = Question(family, preset, 64, autocast, target, memory * MiB)
        found = answer(question, calls.append)
        return found, calls

    return asked


def test_plans_of_every_number_of_blocks_come_the_fastest_first(ask):
    found, calls = ask(10**6)
    assert {plan.setting.num_blocks for plan in found.plans} == {1, 2, 3, 4, 6, 12}
    assert len(found.plans) == 11
    times = [plan.seconds for plan in found.plans]
    assert times == sorted(times)
    # each preset of the family and each number of blocks is a job
    assert calls == [5 + 6] * 11


def test_end_to_end_is_what_others_are_measured_by(ask):
    found, _ = ask(400)
    assert found.whole.setting == Setting(1, "none", 64)
    assert found.whole.estimate.peak_bytes > 400 * MiB


def test_a_gpu_leaves_room_for_its_context(ask):
    on_cpu, on_gpu = (ask(800, target=name)[0] for name in ("cpu", "h100"))
    assert max(plan.estimate.peak_bytes for plan in on_cpu.plans) > 288 * MiB
    assert max(plan.estimate.peak_bytes for plan in on_gpu.plans) <= 288 * MiB


def test_where_nothing_fits_the_smallest_plan_and_a_smaller_preset_are_told(ask):
    found, _ = ask(40)
    assert found.plans == [] and found.largest is None
    assert (found.smallest.setting, found.smallest.offload) == (Setting(12, "layer", 1), "cpu")
    narrow, _ = ask(40, autocast=True)
    assert narrow.smallest.setting == Setting(12, "layer_narrow", 1)


def test_the_largest_preset_has_the_widest_and_most_layers(ask, monkeypatch):
    assert ask(48)[0].largest == "XL/2"

    def wide(setting, config, target):
        found = reckoned(setting, config, target)
        grown = config.model.dim * MiB
        return {k: module.Estimate(**{**vars(v), "peak_bytes": grown}) for k, v in found.items()}

    monkeypatch.setattr(module, "estimate", wide)
    assert [ask(memory)[0].largest for memory in (1151, 1024, 400, 64)] == [
        "L/2",
        "L/2",
        "S/2",
        "digits",
    ]


def test_stem_and_head_are_told_apart(ask):
    assert ask(400)[0].outside == {"parameters": 4 * MiB, "optimizer": 12 * MiB}


def test_jobs_run_in_processes_of_their_own():
    jobs = [partial(abs, -3), partial(pow, 2, 5)]
    assert sorted(module._run(jobs)) == [(0, 3), (1, 32)]
