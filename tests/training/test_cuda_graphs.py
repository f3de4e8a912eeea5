"""Steps that are captured and replayed, and what a CUDA graph is captured with."""

import gc
from contextlib import contextmanager
from unittest.mock import MagicMock, call

import pytest
import torch
from training.recorded import OpRecorder, make_captured
from training.tiny import CPU, PREFETCH, make_trainer, short_of_memory, steps

from dbkernels.training.cuda_graphs import CudaGraphs, CudaRecorder

GPU = torch.device("cuda")


@pytest.mark.parametrize("settings, slots", [({}, 1), (PREFETCH, 2)])
def test_a_block_has_one_graph_and_one_more_for_each_slot(settings, slots):
    trainer, recorder = make_captured(steps=8, **settings)
    kinds, recorded = set(), []
    for _ in range(trainer.total_steps):
        block = trainer.next_block()
        trainer.step_block(block)
        kinds.add((block.index, trainer.offloader.slot))
        recorded.append((recorder.warm, recorder.recorded))
    assert recorder.warm == len(kinds) and {slot for _, slot in kinds} == set(range(slots))
    # when every kind has had its first step, each is recorded once more at most
    already = min(count for warm, count in recorded if warm == len(kinds))
    assert recorder.recorded - already <= len(kinds)


def test_what_a_step_returned_stays_when_the_next_one_runs():
    trainer, _ = make_captured()
    kept, told = [], []
    for step in range(4):
        kept.append(trainer.advance(trainer.blocks[0]))
        told.append([number.item() for number in kept[-1]])
        trainer.groups["block0"].steps = trainer.groups["shared"].steps = step + 1
    assert [[number.item() for number in numbers] for numbers in kept] == told
    assert len({loss for loss, _ in told}) == 4


def test_running_out_of_memory_drops_the_graph_of_the_larger_micro_batch():
    plain = make_trainer(accumulate=2)
    captured, recorder = make_captured(objective=short_of_memory(fits=4)[0])
    rows = steps(captured, [0])
    captured.objective, _ = short_of_memory(fits=2)
    with pytest.warns(UserWarning, match="block 0 at its step 1 with batch 4 in micro-batches"):
        rows += steps(captured, [0])
    assert recorder.replayed == 0
    rows += steps(captured, [0, 0])
    assert [row.pop("micro_batch", None) for row in rows] == [None, 2, None, None]
    # the first at the full size, the second at half of it op by op; the others are replayed
    assert recorder.warm == 2 and recorder.recorded == 2 and recorder.replayed == 2
    for row, expected in zip(rows, steps(plain, [0] * 4), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_closing_a_trainer_drops_its_graphs():
    trainer, recorder = make_captured(**CPU)
    steps(trainer, [0] * 3)
    trainer.close()
    steps(trainer, [0])
    assert (recorder.warm, recorder.recorded, recorder.replayed) == (1, 2, 3)


# graphs without a trainer


@pytest.fixture
def graphs():
    """Runs steps of a kind, which add 1 to a number; what the last one gave; their recorder."""
    recorder = OpRecorder()
    cuda_graphs = CudaGraphs(recorder)

    def run(kind=0, count=1, number=0.0):
        for _ in range(count):
            (result,) = cuda_graphs.run(lambda: kind, lambda: (torch.full((), number) + 1,))
        return result

    run.graphs = cuda_graphs
    run.counts = lambda: (recorder.warm, recorder.recorded, recorder.replayed)
    return run


def test_a_value_that_is_read_back_is_noticed_here(graphs):
    graphs()
    with pytest.raises(RuntimeError, match="read back"):
        graphs.graphs.run(lambda: 0, lambda: (torch.zeros(()).item(),))


def test_a_first_step_that_fails_is_no_warm_up(graphs):
    with pytest.raises(ZeroDivisionError):
        graphs.graphs.run(lambda: 0, lambda: 1 / 0)
    assert graphs(count=2) == 1
    assert graphs.counts() == (2, 1, 1)


def test_no_graph_holds_memory_while_a_step_runs_op_by_op(graphs):
    for kind in (0, 0, 1, 1, 0, 0):
        graphs(kind)
    # what was recorded before the second kind's first step is recorded again after it
    assert graphs.counts() == (2, 3, 4)


# what a CUDA graph is captured with


@pytest.fixture
def cuda(monkeypatch):
    """What stands for torch.cuda; it keeps what it was asked."""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    return torch.cuda


def test_a_capture_lets_other_threads_copy_and_shares_the_pool_of_a_graph_that_is_left(cuda):
    captures, replayed = [], []

    class Graph:
        def __init__(self):
            self.number = len(captures)

        def pool(self):
            return f"pool {self.number}"

        def replay(self):
            replayed.append(self.number)

    @contextmanager
    def capture(graph, **options):
        captures.append(options)
        yield

    cuda.CUDAGraph, cuda.graph = Graph, capture
    recorder = CudaRecorder(GPU)
    recorder.record(tuple)
    gc.collect()
    # the first one is dropped at once, and no graph is left of its pool
    kept = [recorder.record(tuple) for _ in range(3)]
    pools = [each.pop("pool") for each in captures]
    assert pools[:2] == [None, None]
    # that of any graph that is left is the same one
    assert pools[2] == "pool 1" and pools[3] in ("pool 1", "pool 2")
    options = {"stream": cuda.Stream.return_value, "capture_error_mode": "thread_local"}
    assert captures == [options] * 4
    kept[1][0]()
    assert replayed == [2]


def test_a_warm_up_runs_where_the_capture_will_between_waits(cuda):
    CudaRecorder(GPU).warm_up(cuda.step)
    captured, steps = cuda.Stream.return_value, cuda.current_stream.return_value
    assert cuda.mock_calls == [
        call.Stream(GPU),
        call.current_stream(captured.device),
        call.Stream().wait_stream(steps),
        call.stream(captured),
        call.stream().__enter__(),
        call.step(),
        call.stream().__exit__(None, None, None),
        call.current_stream().wait_stream(captured),
    ]
