import os
import time

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")


def test_every_round_begins_with_the_next_competitor(bench, monkeypatch):
    measure, called = bench("measure"), []
    monkeypatch.setitem(measure.WARM_UP_MS, "cpu", 0)
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    measure.interleaved(calls, device=CPU, rounds=4)
    assert "".join(called[-12:]) == "abcbcacababc"


def test_times_belong_to_their_call(bench, monkeypatch):
    measure = bench("measure")
    monkeypatch.setitem(measure.WARM_UP_MS, "cpu", 0)
    calls = {"slow": lambda: time.sleep(0.03), "quick": lambda: None}
    times = measure.interleaved(calls, device=CPU, rounds=5)
    assert times["slow"].median_ms >= 30 > times["quick"].median_ms
    assert times["slow"].p20_ms <= times["slow"].median_ms <= times["slow"].p80_ms
    assert (times["quick"].rounds, times["quick"].timing) == (5, "wall clock")


def test_warms_up_by_time_and_calls_once_at_least(bench):
    measure, called = bench("measure"), []
    measure._warm_up(lambda: called.append(time.sleep(0.002)), 20, lambda: None)
    assert 2 <= len(called) <= 11
    called.clear()
    measure._warm_up(lambda: called.append(None), 0, lambda: None)
    assert len(called) == 1


def test_quantiles_lie_between_samples_in_proportion(bench):
    assert bench("measure").quantiles([6, 1, 5, 2, 4, 3]) == pytest.approx((3.5, 2, 5))
    assert bench("measure").quantiles([1, 2]) == pytest.approx((1.5, 1.2, 1.8))


def test_the_peak_is_what_was_alive_at_once_beyond_what_stayed_before(bench):
    measure, held = bench("measure"), []
    inputs = torch.ones(100)

    def call():
        if not held:
            held.append(torch.ones(10**6))
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        torch.empty(1200)
        del b

    memory = measure.memory(call, inputs=[inputs, inputs[:50]], device=CPU)
    assert memory == measure.Memory(peak_bytes=4 * 1700, resident_bytes=4 * 100)


def test_saved_storages_count_once_and_parameters_not_at_all(bench):
    x = torch.ones(3, 4, requires_grad=True)
    weight = torch.ones(5, 4, requires_grad=True)

    def forward():
        y = x.exp()  # saves y
        return F.linear(y * y.view(3, 4), weight).sin()  # saves y * y, weight and its own input

    kept = 4 * (12 + 12 + 15)
    assert bench("measure").saved_bytes(forward, parameters=[weight]) == kept
    assert bench("measure").saved_bytes(forward, parameters=[]) == kept + 4 * 20


@pytest.mark.parametrize(
    ("impl", "rung"),
    [("eager", None), ("fused", "none"), ("fused", "qkv"), ("checkpointed", None)],
)
def test_what_is_saved_is_what_the_forward_leaves_alive(bench, small_case, impl, rung):
    measure, (case, inputs) = bench("measure"), small_case
    run = bench("layer_case").Competitor(impl, rung).function(case.H)
    with torch.no_grad():
        run(inputs.x, inputs.modulation, inputs.weights)

    def forward():
        # the graph alone holds these, as in a network it holds the outputs of other layers
        return run(inputs.x.clone(), inputs.modulation.clone(), inputs.weights)

    with measure.allocations() as changes:
        out = forward()
    saved = measure.saved_bytes(forward, parameters=inputs.parameters)
    assert sum(changes) - out.nbytes == saved


def test_each_item_has_a_process_of_its_own(bench):
    code = "(__import__('os').getpid(), __import__('os').environ['TORCHINDUCTOR_COMPILE_THREADS'])"
    first, second = bench("measure").in_fresh_processes(eval, [code, f"{code}[::-1]"])
    assert len({first[0], second[1], os.getpid()}) == 3
    assert first[1] == second[0] == "1"


def test_samples_are_of_the_last_calls_and_in_their_order(bench, monkeypatch):
    clock, made = [0.0], []

    def call():
        made.append(len(made))
        clock[0] += 0.001 * made[-1]

    measure = bench("measure")
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "WARM_UP_MS", {"cpu": 5})
    ((milliseconds, timing),) = measure.samples({"a": call}, device=CPU, rounds=3).values()
    assert milliseconds == pytest.approx([float(number) for number in made[-3:]])
    assert timing == "wall clock"
