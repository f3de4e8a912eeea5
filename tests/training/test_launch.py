"""A launch waits for nothing: the row of a step is read when the next one was launched.

It looks at no value on the device, and brings nothing there but by its staging.
"""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from training.bits import assert_same, copies
from training.tiny import DIT, PRIOR, equal, make_trainer, weights

import dbkernels.training.trainer as module
from dbkernels.data.augment import mirror, shift
from dbkernels.training import checkpoint, run
from dbkernels.training.block_order import BlockOrder
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.log import read_log
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}

# a value that is read, and a tensor that is made of numbers of the host: on a GPU both would wait
WAITING = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::equal", "aten::is_nonzero")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in WAITING:
            raise AssertionError(f"{func.name()} in a launch")
        return func(*args, **(kwargs or {}))


def on_host(call):
    """Work of the host, where values may be looked at."""

    @functools.wraps(call)
    def called(*args, **kwargs):
        with _disable_current_modes():
            return call(*args, **kwargs)

    return called


class Data:
    """Reads on the host, and puts as the trainer asks for it; the put is the device's again."""

    def __init__(self, data):
        self.data, self.put = data, 0

    def __len__(self):
        return len(self.data)

    def batch(self, indices, put):
        def counted(tensor):
            self.put += 1
            return put(tensor)

        return on_host(self.data.batch)(indices, counted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "autocast": True},
        IN_BACKWARD,
        {"offload": "cpu"},
        {"offload": "cpu", "prefetch": True, "sharing": "copies"},
        {"clip": 0.0, "warmup": 2, "decay": "cosine", "steps_per_swap": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["vit", "dit"])
def test_steps_are_launched_without_a_wait_and_their_rows_read_late(family, settings, monkeypatch):
    def augment(batch, draw):
        return shift(mirror(batch, draw), draw, pixels=1)

    monkeypatch.setattr(module, "batch_indices", on_host(module.batch_indices))
    monkeypatch.setattr(BlockOrder, "block", on_host(BlockOrder.block))
    trainer, plain = (make_trainer(family, ema=0.9, **settings) for _ in range(2))
    trainer.augment = plain.augment = augment
    trainer.data = data = Data(trainer.data)
    with NoWaiting():
        pending = [trainer.launch(trainer.next_block()) for _ in range(5)]
    assert data.put == 5 * 2 * settings.get("accumulate", 1)
    rows = [plain.step_block(plain.next_block()) for _ in range(5)]
    assert [each.row() for each in pending] == rows
    assert_same(trainer, plain)


@pytest.mark.parametrize("settings", [{}, IN_BACKWARD, {"accumulate": 2}, {"offload": "cpu"}])
def test_rows_that_are_read_late_are_those_that_are_read_at_once(settings):
    late, early = (make_trainer("dit", ema=0.9, **settings) for _ in range(2))
    pending = [late.launch(late.next_block()) for _ in range(late.total_steps)]
    rows = [early.step_block(early.next_block()) for _ in range(early.total_steps)]
    assert [each.row() for each in pending] == rows
    assert_same(late, early)


@pytest.mark.parametrize(
    "look",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss.detach()),
        bool,
        lambda loss: torch.tensor(0.5) * loss,
        lambda loss: torch.equal(loss, loss),
    ],
    ids=["item", "float", "bool", "tensor", "equal"],
)
def test_a_look_at_a_value_is_noticed_here(look):
    inner = make_trainer().objective

    def objective(*arguments):
        loss = inner(*arguments)
        look(loss)
        return loss

    trainer = make_trainer(objective=objective)
    trainer.data = Data(trainer.data)
    with NoWaiting(), pytest.raises(AssertionError, match="in a launch"):
        trainer.launch(trainer.blocks[0])


def test_the_rows_look():
    trainer = make_trainer()
    pending = trainer.launch(trainer.blocks[0])
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense in a launch"):
        pending.row()


def test_a_run_reads_each_row_behind_the_next_launch(monkeypatch):
    happened, trainer = [], make_trainer("dit", steps=1)
    for owner, name in ((Trainer, "launch"), (run.Rows, "settle")):
        inner = getattr(owner, name)

        def told(*args, name=name, inner=inner):
            happened.append(name)
            return inner(*args)

        monkeypatch.setattr(owner, name, told)
    trainer.run()
    # the first has no step before it
    assert happened == ["launch", "settle"] * 3 + ["settle"]


def test_steps_that_are_timed_are_waited_for(monkeypatch):
    waited = []
    trainer = make_trainer(offload="cpu", steps_per_swap=0, steps=9)
    monkeypatch.setattr(
        "dbkernels.training.pending.Numbers.wait", lambda numbers: waited.append(trainer.step)
    )
    for _ in range(8):
        trainer.launch(trainer.next_block())
    assert waited == [1, 2, 3, 4, 5]


# steps that are not finite


def broken_at(step, value):
    """An objective that is not finite at a step of the run: its loss, or its gradient alone."""
    inner, calls = make_trainer("dit").objective, []

    def objective(blocks, block, batch, draw):
        calls.append(draw)
        loss = inner(blocks, block, batch, draw)
        if len(calls) != step + 1:
            return loss
        if value == "loss":
            return loss + math.inf
        # the square root of 0 has no slope that could be multiplied by 0
        return loss + (blocks.model.head.weight * 0).sqrt().sum() * 0

    return objective


def assert_holds(trainer, before):
    after = copies(trainer)
    assert all(equal(after[group], tensors) for group, tensors in before.items())


@pytest.mark.parametrize(
    "value, settings", [("loss", {}), ("gradient", {}), ("loss", IN_BACKWARD)], ids=str
)
def test_nothing_that_is_launched_after_a_step_that_was_not_finite_updates_anything(
    value, settings
):
    trainer = make_trainer("dit", ema=0.9, objective=broken_at(2, value), **settings)
    first = [trainer.launch(trainer.next_block()) for _ in range(2)]
    before, counters, block = copies(trainer), trainer.counters(), trainer.next_block()
    pending = [trainer.launch(trainer.next_block()) for _ in range(3)]
    assert_holds(trainer, before)
    for each in first:
        each.row()
    where = f"in block {block.index} at its step {counters['groups'][f'block{block.index}']}"
    with pytest.raises(FloatingPointError, match=f"{where} .*; nothing was updated"):
        pending[0].row()
    assert trainer.counters() == counters
    assert_holds(trainer, before)
    trainer.step_block(trainer.next_block())
    assert not equal(copies(trainer)["model"], before["model"])


def test_a_step_after_one_that_was_not_finite_is_not_finite_itself():
    trainer = make_trainer("dit", objective=broken_at(0, "loss"))
    for block in trainer.blocks[:2]:
        trainer.launch(block)
    with pytest.raises(FloatingPointError, match="gradient norm nan in block 2"):
        trainer.launch(trainer.blocks[2]).row()


@pytest.mark.parametrize("settings", [{}, IN_BACKWARD, {"accumulate": 2}, {"offload": "cpu"}])
def test_a_trainer_goes_on_from_before_the_step_that_was_not_finite(settings):
    trainer = make_trainer("dit", objective=broken_at(0, "loss"), **settings)
    whole = make_trainer("dit", **settings)
    with pytest.raises(FloatingPointError):
        trainer.run()
    rows = [t.step_block(t.next_block()) for t in (trainer, whole)]
    assert rows[0] == rows[1] and equal(weights(trainer), weights(whole))


def test_a_restored_trainer_updates_again():
    trainer, whole = make_trainer("dit", objective=broken_at(0, "loss")), make_trainer("dit")
    trainer.launch(trainer.blocks[0])
    trainer.restore(copies(whole), whole.counters())
    assert trainer.step_block(trainer.blocks[1]) == whole.step_block(whole.blocks[1])


# runs with a log and checkpoints


@pytest.fixture
def train(tmp_path):
    """Train a run in a directory of this name."""
    images = np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype(np.float32)
    np.save(tmp_path / "data.npy", images)
    np.save(tmp_path / "data_labels.npy", np.arange(12) % 3)
    config = RunConfig(
        family="dit",
        model=DIT,
        data=str(tmp_path / "data.npy"),
        weighting="edm",
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(num_blocks=3),
        prior=PRIOR,
        trainer=TrainerConfig(steps=3, batch_size=4, lr=1e-2, ema=0.9),
    )
    return lambda name="run", **options: run.train(config, tmp_path / name, device="cpu", **options)


def rows_of(directory):
    return read_log(directory / "log.jsonl")


def logged(directory):
    return [row["step"] for row in rows_of(directory)]


def saved(directory):
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def fail(monkeypatch, step, error):
    """Have a launch of a run fail, or its loss where the error is None."""
    inner, calls = DiffusionBlocks.loss, []

    def objective(*arguments):
        calls.append(1)
        if len(calls) > step and error is not None:
            raise error
        return inner(*arguments) + (math.inf if len(calls) == step + 1 else 0)

    monkeypatch.setattr(DiffusionBlocks, "loss", objective)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken image")])
def test_an_error_leaves_every_row_of_the_steps_before_it(tmp_path, train, monkeypatch, error):
    fail(monkeypatch, 5, error)
    told = []
    with pytest.raises(type(error)):
        train(save_every=4, on_step=told.append)
    assert logged(tmp_path / "run") == [row["step"] for row in told] == [0, 1, 2, 3, 4]
    assert saved(tmp_path / "run") == ["step-00000004"]


@pytest.mark.parametrize("save_every, kept", [(1, 5), (2, 4), (5, 5), (0, None)])
def test_a_loss_that_is_not_finite_spoils_neither_log_nor_checkpoint(
    tmp_path, train, monkeypatch, save_every, kept
):
    whole, directory = train("whole"), tmp_path / "run"
    with monkeypatch.context() as broken:
        fail(broken, 5, None)
        with pytest.raises(FloatingPointError, match=r"got loss inf .*; nothing was updated"):
            train(save_every=save_every)
    assert logged(directory) == [0, 1, 2, 3, 4]
    assert saved(directory)[-1:] == ([f"step-{kept:08d}"] if kept else [])
    again = train(resume="latest" if kept else "")
    assert equal(weights(again), weights(whole))
    assert rows_of(directory) == rows_of(tmp_path / "whole")


def test_every_row_is_logged_before_a_checkpoint_is_written(tmp_path, train, monkeypatch):
    rows, save = [], checkpoint.save

    def saving(directory, step, *rest):
        rows.append((step, logged(tmp_path / "run")[-1]))
        save(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save", saving)
    train(save_every=2)
    assert rows == [(step, step - 1) for step in (2, 4, 6, 8, 9)]


def test_a_caller_that_stops_at_a_row_ends_the_log_with_it(tmp_path, train):
    class StopHere(Exception):
        pass

    def on_step(row):
        if row["step"] == 4:
            raise StopHere

    with pytest.raises(StopHere):
        train(on_step=on_step)
    assert logged(tmp_path / "run") == [0, 1, 2, 3, 4]
