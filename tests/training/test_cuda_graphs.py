from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from training.recorded import OpRecorder, TrainerRecorder
from training.tiny import equal, make_trainer

import dbkernels.training.trainer as module
from dbkernels.data.augment import mirror, shift
from dbkernels.training.cuda_graphs import CudaGraphs, open_cuda_graphs

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
        {"optimizer_in_backward": True, "clip": 0.0, "ema": 0.9},
        {"offload": "cpu"},
        {"offload": "cpu", "prefetch": True},
    ],
)
def test_replayed_steps_give_the_bits_of_steps_op_by_op(family, settings):
    def augment(batch, draw):
        return shift(mirror(batch, draw), draw, pixels=1)

    plain = make_trainer(family, **settings)
    captured, recorder = make_captured(family, **settings)
    for trainer in (plain, captured):
        trainer.augment = augment
    for index in ORDER:
        row = captured.step_block(captured.blocks[index])
        assert row == plain.step_block(plain.blocks[index])
    for group, expected in plain.tensors().items():
        assert equal(captured.tensors()[group], expected), group
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


@pytest.mark.parametrize("optimizer", [{}, {"optimizer_in_backward": True, "clip": 0.0}])
def test_a_loss_that_is_not_finite_updates_nothing_in_its_replay_or_in_the_next(optimizer):
    trainer, recorder = make_captured(ema=0.9, **optimizer)
    block, images = trainer.blocks[0], trainer.data.images
    for _ in range(2):
        trainer.step_block(block)
    before = {k: v.clone() for g in trainer.tensors().values() for k, v in g.items()}
    trainer.data = replace(trainer.data, images=np.full_like(images, 1e38))
    broken = trainer.launch(block)
    trainer.data = replace(trainer.data, images=images)
    trainer.launch(block)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        broken.row()
    after = {k: v for g in trainer.tensors().values() for k, v in g.items()}
    assert equal(before, after) and recorder.replayed == 3
    trainer.step_block(block)
    assert recorder.replayed == 4 and trainer.step == 3


def test_a_gradient_that_is_not_finite_updates_nothing_in_a_replay():
    inner, start = make_trainer().objective, torch.ones(())

    def objective(blocks, block, batch, draw):
        # 0, and so is its gradient until the root is taken of 0
        extra = ((blocks.model.head.weight * 0 + start).sqrt() * 0).sum()
        return inner(blocks, block, batch, draw) + extra

    trainer, recorder = make_captured(objective=objective, ema=0.9)
    block = trainer.blocks[0]
    for _ in range(2):
        trainer.step_block(block)
    before = {k: v.clone() for g in trainer.tensors().values() for k, v in g.items()}
    start.zero_()
    with pytest.raises(FloatingPointError, match=r"got loss \d.* norm nan .*nothing was updated"):
        trainer.step_block(block)
    after = {k: v for g in trainer.tensors().values() for k, v in g.items()}
    assert equal(before, after) and recorder.replayed == 2


def test_a_value_that_is_read_back_is_noticed_here():
    cuda_graphs, number = CudaGraphs(OpRecorder()), torch.zeros(())
    cuda_graphs.run(lambda: 0, lambda: (number + 1,))
    with pytest.raises(RuntimeError, match="read back"):
        cuda_graphs.run(lambda: 0, lambda: (number + number.item(),))


def test_dropped_graphs_are_recorded_again():
    recorder = OpRecorder()
    cuda_graphs, number = CudaGraphs(recorder), torch.zeros(())

    def step():
        return (number + 1,)

    for _ in range(3):
        cuda_graphs.run(lambda: 0, step)
    cuda_graphs.drop()
    number = torch.ones(())
    assert cuda_graphs.run(lambda: 0, step)[0] == 2
    assert (recorder.warm, recorder.recorded, recorder.replayed) == (1, 2, 3)


def test_a_first_step_that_fails_is_no_warm_up():
    recorder, fails = OpRecorder(), [True, False, False]
    cuda_graphs, number = CudaGraphs(recorder), torch.zeros(())

    def step():
        if fails.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (number + 1,)

    with pytest.raises(torch.OutOfMemoryError):
        cuda_graphs.run(lambda: 0, step)
    for _ in range(2):
        assert cuda_graphs.run(lambda: 0, step)[0] == 1
    assert (recorder.warm, recorder.recorded) == (2, 1)


def test_no_graph_holds_memory_while_a_step_runs_op_by_op():
    recorder, number = OpRecorder(), torch.zeros(())
    cuda_graphs = CudaGraphs(recorder)
    for kind in (0, 0, 1, 1, 0, 0):
        cuda_graphs.run(lambda kind=kind: kind, lambda: (number + 1,))
    # what was recorded before the second kind's first step is recorded again after it
    assert (recorder.warm, recorder.recorded, recorder.replayed) == (2, 3, 4)


def test_closing_a_trainer_drops_its_graphs():
    trainer, recorder = make_captured(offload="cpu")
    block = trainer.blocks[0]
    for _ in range(3):
        trainer.step_block(block)
    trainer.close()
    trainer.step_block(block)
    assert recorder.recorded == 2


def test_graphs_want_a_gpu():
    with pytest.raises(
        ValueError, match="cuda_graphs must be run on an NVIDIA GPU, got device cpu"
    ):
        open_cuda_graphs(torch.device("cpu"), [])
    with pytest.raises(ValueError, match="got device cpu"):
        make_trainer(cuda_graphs=True)
