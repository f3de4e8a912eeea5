"""Steps that are captured and replayed: their bits, and what a CUDA graph is captured with."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from training.bits import assert_same_steps, copies
from training.recorded import OpRecorder, TrainerRecorder
from training.tiny import equal, make_trainer

import dbkernels.training.trainer as module
from dbkernels.data.augment import mirror, shift
from dbkernels.training.cuda_graphs import CudaGraphs, CudaRecorder, open_cuda_graphs

IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}
ORDER = [0, 1, 0, 2, 0, 1, 1, 2, 2, 0, 1, 2]


def make_captured(family="vit", **settings):
    """A trainer that replays its steps, and its recorder."""
    recorder = TrainerRecorder()
    with patch.object(module, "open_cuda_graphs", lambda device, groups: CudaGraphs(recorder)):
        recorder.trainer = make_trainer(family, cuda_graphs=True, **settings)
    return recorder.trainer, recorder


@pytest.mark.parametrize("family", ["vit", "dit"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 1e-2, "ema": 0.9, "warmup": 2, "decay": "cosine"},
        {"accumulate": 2, "autocast": True, "sharing": "copies"},
        {**IN_BACKWARD, "ema": 0.9},
        {"offload": "cpu"},
        {"offload": "cpu", "prefetch": True},
    ],
)
def test_replayed_steps_give_the_bits_of_steps_op_by_op(family, settings):
    def augment(batch, draw):
        return shift(mirror(batch, draw), draw, pixels=1)

    plain = make_trainer(family, **settings)
    captured, recorder = make_captured(family, **settings)
    plain.augment = captured.augment = augment
    assert_same_steps(captured, plain, ORDER)
    assert recorder.warm + recorder.replayed == len(ORDER) and recorder.replayed > 3


def test_a_block_has_one_graph_and_one_more_for_each_slot():
    for settings, slots in (({}, 1), ({"offload": "cpu", "prefetch": True}, 2)):
        trainer, recorder = make_captured(steps=8, **settings)
        kinds, recorded = set(), []
        for _ in range(trainer.total_steps):
            block = trainer.next_block()
            trainer.step_block(block)
            kinds.add((block.index, trainer.offloader.slot))
            recorded.append((recorder.warm, recorder.recorded))
        assert recorder.warm == len(kinds)
        # when every kind has had its first step, each is recorded once more at most
        (already, *_) = [count for warm, count in recorded if warm == len(kinds)]
        assert recorder.recorded - already <= len(kinds)
        assert {slot for _, slot in kinds} == set(range(slots))


def test_what_a_step_returned_stays_when_the_next_one_runs():
    trainer, _ = make_captured()
    block = trainer.blocks[0]
    kept, told = [], []
    for step in range(4):
        kept.append(trainer.advance(block))
        told.append([number.item() for number in kept[-1]])
        trainer.groups["block0"].steps = trainer.groups["shared"].steps = step + 1
    assert [[number.item() for number in numbers] for numbers in kept] == told
    assert len({loss for loss, _ in told}) == 4


def test_running_out_of_memory_drops_the_graph_of_the_larger_micro_batch():
    inner, fits = make_trainer().objective, 4

    def objective(blocks, block, batch, draw):
        if len(batch["label"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(blocks, block, batch, draw)

    plain = make_trainer(accumulate=2)
    captured, recorder = make_captured(objective=objective)
    block = captured.blocks[0]
    rows = [captured.step_block(block)]
    fits = 2
    with pytest.warns(UserWarning, match="block 0 at its step 1 with batch 4 in micro-batches"):
        rows.append(captured.step_block(block))
    rows += [captured.step_block(block) for _ in range(2)]
    assert rows[1].pop("micro_batch") == 2
    # the first at the full size, the second at half of it op by op; the others are replayed
    assert recorder.warm == 2 and recorder.recorded == 2 and recorder.replayed == 2
    for row in rows:
        assert row == pytest.approx(plain.step_block(block), rel=1e-4)


@pytest.mark.parametrize(
    "broken, settings", [("loss", {}), ("loss", IN_BACKWARD), ("gradient", {})], ids=str
)
def test_what_is_not_finite_updates_nothing_in_its_replay_or_in_the_next(broken, settings):
    inner, start = make_trainer().objective, torch.ones(())

    def objective(blocks, block, batch, draw):
        # 0, and so is its gradient until the root is taken of 0
        extra = ((blocks.model.head.weight * 0 + start).sqrt() * 0).sum()
        return inner(blocks, block, batch, draw) + extra

    trainer, recorder = make_captured(objective=objective, ema=0.9, **settings)
    block, data = trainer.blocks[0], trainer.data
    for _ in range(2):
        trainer.step_block(block)
    before, counters = copies(trainer), trainer.counters()
    if broken == "loss":
        trainer.data = replace(data, images=np.full_like(data.images, 1e38))
    else:
        start.zero_()
    pending = trainer.launch(block)
    trainer.data = data
    start.fill_(1)
    trainer.launch(block)
    message = "gradient norm nan" if broken == "gradient" else "got loss"
    with pytest.raises(FloatingPointError, match=f"{message} .*nothing was updated"):
        pending.row()
    assert recorder.replayed == 3 and trainer.counters() == counters
    assert all(equal(copies(trainer)[group], tensors) for group, tensors in before.items())
    trainer.step_block(block)
    assert recorder.replayed == 4 and trainer.step == 3


def test_closing_a_trainer_drops_its_graphs():
    trainer, recorder = make_captured(offload="cpu")
    block = trainer.blocks[0]
    for _ in range(3):
        trainer.step_block(block)
    trainer.close()
    trainer.step_block(block)
    assert recorder.recorded == 2


def test_graphs_want_a_gpu():
    message = "cuda_graphs must be run on an NVIDIA GPU, got device cpu"
    for opened in (
        lambda: open_cuda_graphs(torch.device("cpu"), []),
        lambda: make_trainer(cuda_graphs=True),
    ):
        with pytest.raises(ValueError, match=message):
            opened()


# graphs without a trainer


def run(cuda_graphs, kind=0, count=1, number=None):
    """Steps of a kind, which add 1 to a number; what the last one gave."""
    number = torch.zeros(()) if number is None else number
    for _ in range(count):
        (result,) = cuda_graphs.run(lambda: kind, lambda: (number + 1,))
    return result


def test_a_value_that_is_read_back_is_noticed_here():
    cuda_graphs, number = CudaGraphs(OpRecorder()), torch.zeros(())
    run(cuda_graphs)
    with pytest.raises(RuntimeError, match="read back"):
        cuda_graphs.run(lambda: 0, lambda: (number + number.item(),))


def test_dropped_graphs_are_recorded_again():
    recorder = OpRecorder()
    cuda_graphs = CudaGraphs(recorder)
    run(cuda_graphs, count=3)
    cuda_graphs.drop()
    assert run(cuda_graphs, number=torch.ones(())) == 2
    assert (recorder.warm, recorder.recorded, recorder.replayed) == (1, 2, 3)


def test_a_first_step_that_fails_is_no_warm_up():
    recorder = OpRecorder()
    cuda_graphs = CudaGraphs(recorder)
    with pytest.raises(ZeroDivisionError):
        cuda_graphs.run(lambda: 0, lambda: 1 / 0)
    assert run(cuda_graphs, count=2) == 1
    assert (recorder.warm, recorder.recorded) == (2, 1)


def test_no_graph_holds_memory_while_a_step_runs_op_by_op():
    recorder = OpRecorder()
    cuda_graphs = CudaGraphs(recorder)
    for kind in (0, 0, 1, 1, 0, 0):
        run(cuda_graphs, kind)
    # what was recorded before the second kind's first step is recorded again after it
    assert (recorder.warm, recorder.recorded, recorder.replayed) == (2, 3, 4)


# what a CUDA graph is captured with


class Stream:
    def __init__(self, name, told):
        self.name, self._told, self.device = name, told, torch.device("cuda")

    def wait_stream(self, other):
        self._told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch):
    """What a recorder tells torch, in order: captures by their options, and waits."""
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
    # the first one is dropped at once
    for _ in range(2):
        recorder.record(lambda: (torch.ones(()),))
        gc.collect()
    assert [each["pool"] for each in captured_with(told)] == [None, None]


def test_a_warm_up_runs_where_the_capture_will_between_waits(told):
    recorder = CudaRecorder(torch.device("cuda"), [])
    recorder.warm_up(lambda: told.append("step"))
    waits = ["captured waits for steps", "on captured", "step", "steps waits for captured"]
    assert told == waits


@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_can_be_captured_in_a_capture_alone(told, fails):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    recorder, seen = CudaRecorder(torch.device("cuda"), [optimizer]), []

    def step():
        seen.append(optimizer.param_groups[0]["capturable"])
        return (1 / (1 - fails),)

    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        recorder.record(step)
    assert seen == [True] and not optimizer.param_groups[0]["capturable"]
