import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")


def test_every_round_begins_with_the_next_competitor(bench):
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    bench("measure").interleaved(calls, device=CPU, rounds=4)
    assert "".join(called[-12:]) == "abcbcacababc"


def test_warms_up_by_time_and_calls_once_at_least(bench):
    measure, called = bench("measure"), []
    measure._warm_up(lambda: called.append(time.sleep(0.002)), 20, lambda: None)
    assert 2 <= len(called) <= 11
    called.clear()
    measure._warm_up(lambda: called.append(None), 0, lambda: None)
    assert len(called) == 1


class FakeGpu:
    """What the clock asks of a GPU, whose cache has 1 KiB and on which a graph takes 6 ms."""

    def __init__(self, patch):
        self.log, self.now, self.graphs = [], 0.0, []
        summed = torch.sum
        patch.setattr(torch, "sum", lambda *a, **k: (self.log.append("read"), summed(*a, **k))[1])
        of_gpu = {
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
            "synchronize": lambda *_: None,
            "current_stream": lambda *_: "stream",
            "default_stream": lambda *_: "default",
            "Event": lambda enable_timing: FakeEvent(self),
            "CUDAGraph": lambda: self,
            "graph": lambda graph, stream: graph,
        }
        for name, value in of_gpu.items():
            patch.setattr(torch.cuda, name, value)

    def __enter__(self):
        self.before = len(self.log)

    def __exit__(self, *_):
        self.graphs.append(self.log[self.before :])

    def replay(self):
        self.log.append("replay")
        self.now += 6.0


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def test_before_each_time_the_cache_is_filled_by_reading_twice_its_size(bench, gpu):
    clock = bench("measure")._CudaClock(CPU, capture=True)
    before = clock.evicting.clone()
    run, timing = clock.ready(lambda: gpu.log.append("op"))
    gpu.log.clear()
    assert (clock.ms(run), timing) == (6.0, "cuda graph")
    assert gpu.log == ["read", "replay"]
    assert clock.evicting.nbytes == 2 * 1024
    assert torch.equal(clock.evicting, before) and float(clock.sum) == before.numel()


def test_copies_of_the_inputs_are_launched_in_one_graph_and_share_its_time(bench, gpu, monkeypatch):
    measure = bench("measure")
    clock = measure._CudaClock(CPU, capture=True)
    monkeypatch.setattr(measure, "_clock", lambda device, capture: clock)
    calls = {"three": [lambda n=n: gpu.log.append(n) for n in range(3)], "one": lambda: None}
    times = measure.interleaved(calls, device=CPU, rounds=2)
    assert gpu.graphs == [[0, 1, 2], []]
    assert (times["three"].median_ms, times["one"].median_ms) == (2.0, 6.0)


def test_all_results_of_a_graph_are_alive_at_once(bench, gpu):
    alive, most = [0], [0]

    class Result:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    measure = bench("measure")
    measure._CudaClock(CPU, capture=True).ready(lambda: measure._all_of([Result] * 4))
    assert (most[0], alive[0]) == (4, 0)


def refused(*_):
    raise RuntimeError("a value was read back")


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [(FakeGpu, "__enter__", refused), (torch.cuda, "current_stream", lambda *_: "default")],
    ids=["a read", "the default stream"],
)
def test_what_cannot_be_captured_is_timed_by_events(bench, gpu, monkeypatch, where, name, value):
    monkeypatch.setattr(where, name, value)
    run, timing = bench("measure")._CudaClock(CPU, capture=True).ready(lambda: "result")
    assert (run(), timing) == ("result", "cuda events")


@pytest.mark.parametrize(("moved", "count"), [(100, 21), (2048, 1), (2047, 2), (10**6, 1)])
def test_so_many_copies_move_twice_what_the_cache_holds(bench, gpu, moved, count):
    assert bench("measure").rotations(torch.device("cuda"), moved) == count
    assert bench("measure").rotations(CPU, moved) == 1


def test_the_ceiling_moves_the_bytes_of_a_call(bench):
    calls = bench("measure").copies(CPU, 1000, 2)
    results = [call() for call in calls]
    assert [each.nbytes for each in results] == [500, 500] and all(r.all() for r in results)


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
    assert memory == {"peak_bytes": 4 * 1700, "resident_bytes": 4 * 100}


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
    ("impl", "recompute"),
    [("eager", None), ("fused", "none"), ("fused", "qkv"), ("checkpointed", None)],
)
def test_what_is_saved_is_what_the_forward_leaves_alive(bench, small_case, impl, recompute):
    measure, (case, inputs) = bench("measure"), small_case
    run = bench("layer_case").Competitor(impl, recompute).function(case.num_heads)
    with torch.no_grad():
        run(inputs.x, inputs.modulation, inputs.weights)

    def forward():
        # the graph alone holds these, as in a network it holds the outputs of other layers
        return run(inputs.x.clone(), inputs.modulation.clone(), inputs.weights)

    with measure.growth(CPU) as found:
        out = forward()
    saved = measure.saved_bytes(forward, parameters=inputs.parameters)
    assert found["left_bytes"] - out.nbytes == saved


@pytest.fixture
def pass_ms(bench, monkeypatch):
    """Moves on what the wall clock says."""
    now = [0.0]
    monkeypatch.setattr(bench("measure").time, "perf_counter", lambda: now[0] / 1e3)
    monkeypatch.setattr(bench("measure"), "WARM_UP_MS", {"cpu": 5})
    return lambda ms: now.append(now.pop() + ms)


def test_samples_are_of_the_last_calls_in_their_order_and_belong_to_their_call(bench, pass_ms):
    made = []

    def slower():
        made.append(len(made))
        pass_ms(made[-1])

    calls = {"slower": slower, "quick": lambda: pass_ms(1)}
    samples = bench("measure").samples(calls, device=CPU, rounds=3)
    last = {"slower": made[-3:], "quick": [1] * 3}
    assert samples == {key: (pytest.approx(ms), "wall clock") for key, ms in last.items()}


def test_what_is_prepared_before_a_call_takes_no_time(bench, pass_ms):
    call = mock.Mock(side_effect=lambda: pass_ms(1))
    call.prepare.side_effect = lambda: pass_ms(5000)
    times = bench("measure").interleaved({"a": call}, device=CPU, rounds=2)
    ms = pytest.approx(1.0)
    assert call.prepare.call_count == 2
    assert times["a"] == bench("measure").Times(ms, ms, ms, rounds=2, timing="wall clock")
