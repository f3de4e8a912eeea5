"""Captured steps on a GPU: their bits, their memory, and what may go on beside a capture."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from training.bits import assert_same_steps
from training.on_gpu import ASIDE, IN_BACKWARD, make_trainer
from training.recorded import TrainerRecorder

import dbkernels.training.trainer as trainer_module
from dbkernels.training.cuda_graphs import CudaGraphs, CudaRecorder

pytestmark = pytest.mark.gpu

MiB = 2**20


@pytest.fixture
def make_captured(gpu, rehearsed, monkeypatch):
    """Trainers of captured steps; where it is rehearsed, of steps whose ops are recorded."""

    def make(*args, **settings):
        if not rehearsed:
            return make_trainer(gpu, *args, cuda_graphs=True, **settings)
        recorder = TrainerRecorder()
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "open_cuda_graphs", lambda *_: CudaGraphs(recorder))
            recorder.trainer = make_trainer(gpu, *args, cuda_graphs=True, **settings)
        return recorder.trainer

    return make


@pytest.mark.parametrize(
    "settings",
    [{}, IN_BACKWARD, {"accumulate": 2, "autocast": True}, ASIDE, {**ASIDE, "prefetch": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["dit", "vit"])
def test_captured_steps_give_the_bits_of_steps_op_by_op(gpu, make_captured, family, settings):
    assert_same_steps(make_captured(family, **settings), make_trainer(gpu, family, **settings))


def test_graphs_are_captured_again_after_the_trainer_was_closed(gpu, make_captured):
    plain, captured = make_trainer(gpu, offload="cpu"), make_captured(offload="cpu")
    for _ in range(2):
        assert_same_steps(captured, plain, (0, 0, 0, 1))
        captured.close()


@contextmanager
def no_waiting(device):
    """On a GPU, whoever waits for it raises."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"accumulate": 2, "autocast": True}, {**ASIDE, **IN_BACKWARD, "prefetch": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["dit", "vit"])
def test_a_launch_waits_for_nothing(gpu, make_captured, family, settings, cuda_graphs):
    make = make_captured if cuda_graphs else partial(make_trainer, gpu)
    trainer = make(family, **settings)
    # kernels are compiled, pages locked and graphs recorded by then
    for _ in range(4):
        for block in trainer.blocks:
            trainer.step_block(block)
    with no_waiting(gpu):
        pending = [trainer.launch(block) for block in trainer.blocks]
    assert [each.row()["block"] for each in pending] == [0, 1, 2]


@pytest.mark.needs_gpu("a wait that CUDA reports")
def test_a_launch_that_waits_would_be_noticed(gpu):
    with no_waiting(gpu), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device=gpu).sum().item()


@pytest.mark.needs_gpu("the memory of graphs")
def test_graphs_share_one_pool(gpu):
    recorder, x = CudaRecorder(gpu, []), torch.ones(64 * MiB // 4, device=gpu)

    def step():
        return ((x * 2 + x * 3).sum(),)

    recorder.warm_up(step)
    kept, reserved = [], []
    for _ in range(4):
        kept.append(recorder.record(step))
        reserved.append(torch.cuda.memory_reserved())
    for replay, (result,) in kept:
        replay()
        assert result.item() == 5 * x.numel()
    # the temporaries of another pool would be 64 MiB or more, those of a graph's results are small
    assert reserved[-1] - reserved[0] < 32 * MiB


@pytest.mark.needs_gpu("what CUDA forbids beside a capture")
def test_another_thread_may_copy_and_allocate_during_a_capture(gpu):
    recorder, x = CudaRecorder(gpu, []), torch.ones(3, device=gpu)
    stream, host = torch.cuda.Stream(), torch.ones(MiB)

    def beside():
        with torch.cuda.stream(stream):
            # a new allocation of the driver's, a copy that waits, and an event that is waited for
            room = torch.zeros(512 * MiB // 4, device=gpu)
            room[: len(host)].copy_(host)
            stream.record_event().synchronize()
            return room[: len(host)].sum().item()

    def step():
        y = x * 2
        with ThreadPoolExecutor(1) as thread:
            copied.append(thread.submit(beside).result())
        return (y + 1,)

    copied = []
    recorder.warm_up(lambda: (x * 2 + 1,))
    replay, (y,) = recorder.record(step)
    replay()
    assert copied == [float(MiB)] and y.tolist() == [3.0] * 3
