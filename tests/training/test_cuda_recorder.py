"""What a CUDA graph of steps is captured with, told by a fake of torch's."""

import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dbkernels.training.cuda_graphs import CudaRecorder


class Stream:
    def __init__(self, name, told):
        self.name, self._told, self.device = name, told, torch.device("cuda")

    def wait_stream(self, other):
        self._told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch):
    """Captures and waits, in order."""
    told, steps = [], Stream("steps", [])
    steps._told = told

    class Graph:
        def __init__(self):
            self.name = f"graph{sum(isinstance(t, dict) for t in told)}"

        def pool(self):
            return f"pool of {self.name}"

        def replay(self):
            told.append(f"replay {self.name}")

    @contextmanager
    def graph(cuda_graph, **options):
        told.append({**options, "stream": options["stream"].name})
        yield

    @contextmanager
    def on(stream):
        told.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("captured", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return told


def captured_with(told):
    return [each for each in told if isinstance(each, dict)]


def test_a_capture_lets_other_threads_copy_and_shares_the_pool_of_the_graphs_before_it(told):
    recorder = CudaRecorder(torch.device("cuda"), [])
    kept = [recorder.record(lambda: (torch.ones(()),)) for _ in range(3)]
    first, *others = captured_with(told)
    assert first == {"pool": None, "stream": "captured", "capture_error_mode": "thread_local"}
    assert all(other["capture_error_mode"] == "thread_local" for other in others)
    assert all(other["stream"] == "captured" for other in others)
    # that of any graph that is left is the same one
    assert all(other["pool"].startswith("pool of graph") for other in others)
    kept[1][0]()
    assert told[-1] == "replay graph1"


def test_a_pool_of_which_no_graph_is_left_is_not_used_again(told):
    recorder = CudaRecorder(torch.device("cuda"), [])
    kept = recorder.record(lambda: (torch.ones(()),))
    assert kept
    del kept
    gc.collect()
    recorder.record(lambda: (torch.ones(()),))
    assert [each["pool"] for each in captured_with(told)] == [None, None]


def test_a_warm_up_runs_where_the_capture_will_between_waits(told):
    recorder = CudaRecorder(torch.device("cuda"), [])
    recorder.warm_up(lambda: told.append("step"))
    waits = ["captured waits for steps", "on captured", "step", "steps waits for captured"]
    assert told == waits


@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_can_be_captured_in_a_capture_alone(told, fails):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    recorder = CudaRecorder(torch.device("cuda"), [optimizer])
    seen = []

    def step():
        seen.append(optimizer.param_groups[0]["capturable"])
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (torch.ones(()),)

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            recorder.record(step)
    else:
        recorder.record(step)
    assert seen == [True] and not optimizer.param_groups[0]["capturable"]
