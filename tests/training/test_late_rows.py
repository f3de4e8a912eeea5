"""Steps that are launched before the row of the one before them is read."""

import math
from pathlib import Path

import numpy as np
import pytest
from training.tiny import DIT, PRIOR, equal, make_trainer, weights

from dbkernels.training import checkpoint, run
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.log import read_log
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

KINDS = [{}, {"optimizer_in_backward": True, "clip": 0.0}, {"accumulate": 2}, {"offload": "cpu"}]


def everything(trainer):
    return {k: v.clone() for group in trainer.tensors().values() for k, v in group.items()}


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


@pytest.mark.parametrize("settings", KINDS)
def test_rows_that_are_read_late_are_those_that_are_read_at_once(settings):
    late, early = (make_trainer("dit", ema=0.9, **settings) for _ in range(2))
    pending = [late.launch(late.next_block()) for _ in range(late.total_steps)]
    rows = [early.step_block(early.next_block()) for _ in range(early.total_steps)]
    assert [each.row() for each in pending] == rows
    assert equal(everything(late), everything(early))


@pytest.mark.parametrize("value", ["loss", "gradient"])
def test_nothing_that_is_launched_after_a_step_that_was_not_finite_updates_anything(value):
    trainer = make_trainer("dit", ema=0.9, objective=broken_at(2, value))
    first = [trainer.launch(trainer.next_block()) for _ in range(2)]
    before, counters, block = everything(trainer), trainer.counters(), trainer.next_block()
    pending = [trainer.launch(trainer.next_block()) for _ in range(3)]
    assert equal(everything(trainer), before)
    for each in first:
        each.row()
    where = f"in block {block.index} at its step {counters['groups'][f'block{block.index}']}"
    with pytest.raises(FloatingPointError, match=f"{where} .*; nothing was updated"):
        pending[0].row()
    assert trainer.counters() == counters
    assert equal(everything(trainer), before)


def test_a_step_after_one_that_was_not_finite_is_not_finite_itself():
    trainer = make_trainer("dit", objective=broken_at(0, "loss"))
    for block in trainer.blocks[:2]:
        trainer.launch(block)
    with pytest.raises(FloatingPointError, match="gradient norm nan in block 2"):
        trainer.launch(trainer.blocks[2]).row()


def test_an_optimizer_in_the_backward_moves_nothing_in_the_steps_after_one_that_was_not_finite():
    settings = {"optimizer_in_backward": True, "clip": 0.0}
    trainer = make_trainer("dit", ema=0.9, objective=broken_at(0, "loss"), **settings)
    before = everything(trainer)
    pending = [trainer.launch(block) for block in trainer.blocks]
    assert equal(everything(trainer), before)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        pending[0].row()
    trainer.step_block(trainer.blocks[0])
    assert not equal(everything(trainer), before)


@pytest.mark.parametrize("settings", KINDS)
def test_a_trainer_goes_on_from_before_the_step_that_was_not_finite(settings):
    trainer = make_trainer("dit", objective=broken_at(0, "loss"), **settings)
    whole = make_trainer("dit", **settings)
    with pytest.raises(FloatingPointError):
        trainer.run()
    rows = [t.step_block(t.next_block()) for t in (trainer, whole)]
    assert rows[0] == rows[1] and equal(weights(trainer), weights(whole))


def test_a_restored_trainer_updates_again():
    trainer, whole = make_trainer("dit", objective=broken_at(0, "loss")), make_trainer("dit")
    tensors = {g: {k: v.clone() for k, v in t.items()} for g, t in whole.tensors().items()}
    trainer.launch(trainer.blocks[0])
    trainer.restore(tensors, whole.counters())
    assert trainer.step_block(trainer.blocks[1]) == whole.step_block(whole.blocks[1])


def test_a_run_reads_each_row_behind_the_next_launch(monkeypatch):
    happened = []
    trainer, launch = make_trainer("dit", steps=1), Trainer.launch
    row = run.Rows.settle

    def launched(trainer, block):
        happened.append("launch")
        return launch(trainer, block)

    def settled(rows):
        happened.append("row")
        row(rows)

    monkeypatch.setattr(Trainer, "launch", launched)
    monkeypatch.setattr(run.Rows, "settle", settled)
    trainer.run()
    # the first has no step before it
    assert happened == ["launch", "row"] * 3 + ["row"]


def test_steps_that_are_timed_are_waited_for(monkeypatch):
    waited = []
    settings = {"offload": "cpu", "steps_per_swap": 0, "steps": 9}
    trainer = make_trainer(**settings)
    monkeypatch.setattr(
        "dbkernels.training.trainer.Numbers.wait", lambda numbers: waited.append(trainer.step)
    )
    for _ in range(8):
        trainer.launch(trainer.next_block())
    assert waited == [1, 2, 3, 4, 5]


# runs with a log and checkpoints


@pytest.fixture
def config(tmp_path):
    images = np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype(np.float32)
    np.save(tmp_path / "data.npy", images)
    np.save(tmp_path / "data_labels.npy", np.arange(12) % 3)
    return RunConfig(
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


def logged(directory: Path):
    return [row["step"] for row in read_log(directory / "log.jsonl")]


def saved(directory: Path):
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def fail(monkeypatch, step, error):
    """Have a launch of a run fail, or its loss where the error is None."""
    inner, calls = DiffusionBlocks.loss, []

    def objective(*arguments):
        calls.append(1)
        if len(calls) <= step:
            return inner(*arguments)
        if error is None:
            return inner(*arguments) + (math.inf if len(calls) == step + 1 else 0)
        raise error

    monkeypatch.setattr(DiffusionBlocks, "loss", objective)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken image")])
def test_an_error_leaves_every_row_of_the_steps_before_it(tmp_path, config, monkeypatch, error):
    fail(monkeypatch, 5, error)
    told = []
    with pytest.raises(type(error)):
        run.train(config, tmp_path / "run", device="cpu", save_every=4, on_step=told.append)
    assert logged(tmp_path / "run") == [row["step"] for row in told] == [0, 1, 2, 3, 4]
    assert saved(tmp_path / "run") == ["step-00000004"]


@pytest.mark.parametrize("save_every, kept", [(1, 5), (2, 4), (5, 5), (0, None)])
def test_a_loss_that_is_not_finite_spoils_neither_log_nor_checkpoint(
    tmp_path, config, monkeypatch, save_every, kept
):
    whole = run.train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as broken:
        fail(broken, 5, None)
        with pytest.raises(FloatingPointError, match=r"got loss inf .*; nothing was updated"):
            run.train(config, tmp_path / "run", device="cpu", save_every=save_every)
    assert logged(tmp_path / "run") == [0, 1, 2, 3, 4]
    assert saved(tmp_path / "run")[-1:] == ([f"step-{kept:08d}"] if kept else [])
    again = run.train(config, tmp_path / "run", device="cpu", resume="latest" if kept else "")
    assert equal(weights(again), weights(whole))
    assert read_log(tmp_path / "run" / "log.jsonl") == read_log(tmp_path / "whole" / "log.jsonl")


def test_every_row_is_logged_before_a_checkpoint_is_written(tmp_path, config, monkeypatch):
    rows, save = [], checkpoint.save

    def saving(directory, step, *rest):
        rows.append((step, logged(tmp_path / "run")[-1]))
        save(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save", saving)
    run.train(config, tmp_path / "run", device="cpu", save_every=2)
    assert rows == [(step, step - 1) for step in (2, 4, 6, 8, 9)]


def test_a_caller_that_stops_at_a_row_ends_the_log_with_it(tmp_path, config):
    class StopHere(Exception):
        pass

    def on_step(row):
        if row["step"] == 4:
            raise StopHere

    with pytest.raises(StopHere):
        run.train(config, tmp_path / "run", device="cpu", on_step=on_step)
    assert logged(tmp_path / "run") == [0, 1, 2, 3, 4]
