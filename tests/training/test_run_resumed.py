"""Runs that end early: what they leave in their log and checkpoints, and how they go on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from training.tiny import CPU, assert_same, equal

from dbkernels.models.vit import PUBLISHED
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.log import read_log
from dbkernels.training.run import load_run
from dbkernels.training.trainer import Trainer

RUN, WHOLE = Path("run"), Path("whole")
DISK = {"offload": "disk", "offload_dir": "off", "prefetch": True}


def rows_of(directory=RUN):
    return read_log(directory / "log.jsonl")


def logged(directory=RUN):
    return [row["step"] for row in rows_of(directory)]


def saved(directory=RUN):
    return sorted((directory / "checkpoints").glob("step-*"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "family, stop, settings, before, after, resume",
    [
        ("dit", 2, {}, {}, {}, "latest"),
        ("dit", 5, {}, {}, {}, "latest"),
        ("dit", 9, {}, {}, {}, "run/checkpoints/step-00000008"),
        # in a turn, and wherever blocks are
        ("vit", 4, {"steps_per_swap": 3}, CPU, DISK, "latest"),
        ("vit", 7, {"steps_per_swap": 3}, CPU, DISK, "latest"),
        ("vit", 5, {}, {}, {"offload_activations": True}, "latest"),
        ("vit", 5, {"clip": 0.0}, {}, {"optimizer_in_backward": True}, "latest"),
        ("mdm", 5, {"stride": 1}, {}, {}, "latest"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    make_config, train, family, stop, settings, before, after, resume
):
    def on_row(row):
        if row["step"] == stop:
            raise Interrupted

    if family == "dit":
        settings = {**settings, "label_drop": 0.3, "mirror": True, "shift": 1}
    whole = train(make_config(family, **settings), "whole")
    with pytest.raises(Interrupted):
        train(make_config(family, **settings, **before), save_every=2, on_row=on_row)
    # of the step that was launched by then, too
    assert logged() == list(range(int(saved()[-1].name.removeprefix("step-"))))
    config = make_config(family, **settings, **after)
    resumed = train(config, save_every=2, resume=resume)
    assert_same(resumed, whole)
    # in the backward the norm is summed up in another order
    assert rows_of() == rows_of(WHOLE) or "optimizer_in_backward" in after
    # of every place that blocks were in
    for path in saved():
        load_run(RUN, which=str(path), device="cpu")
    (ours, _), (theirs, _) = (checkpoint.load(saved(each)[-1]) for each in (RUN, WHOLE))
    assert ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("after", [{}, DISK, {"accumulate": 2}], ids=str)
def test_a_resumed_run_leaves_out_what_a_whole_one_does(make_config, train, after):
    def config(**settings):
        made = make_config("vit", **settings)
        return replace(made, model=replace(made.model, **PUBLISHED))

    def on_row(row):
        if row["step"] == 5:
            raise Interrupted

    whole = train(config(**({} if "offload" in after else after)), "whole")
    with pytest.raises(Interrupted):
        train(config(**({} if "offload" in after else after)), save_every=2, on_row=on_row)
    assert_same(train(config(**after), resume="latest"), whole)
    plain = config()
    plain = replace(plain, model=replace(plain.model, dropout=0.0, attention_dropout=0.0))
    without = train(plain, "plain")
    assert not equal(dict(without.blocks.named_parameters()), dict(whole.blocks.named_parameters()))


def fail(monkeypatch, step, error):
    """Have a launch of a run fail, or its loss where the error is None."""
    inner, calls = DiffusionBlocks.loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) > step and error is not None:
            raise error
        return inner(*arguments) + (math.inf if len(calls) == step + 1 else 0)

    monkeypatch.setattr(DiffusionBlocks, "loss", loss)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken image")])
def test_an_error_leaves_every_row_of_the_steps_before_it(make_config, train, monkeypatch, error):
    fail(monkeypatch, 5, error)
    told, closed = [], []
    monkeypatch.setattr(Trainer, "close", lambda trainer: closed.append(trainer.step))
    with pytest.raises(type(error)):
        train(make_config("dit"), save_every=4, on_row=told.append)
    assert logged() == [0, 1, 2, 3, 4] and rows_of() == told
    assert [path.name for path in saved()] == ["step-00000004", "step-00000005"] and closed == [5]


@pytest.mark.parametrize("save_every, kept", [(1, 5), (2, 4), (5, 5), (0, None)])
def test_a_loss_that_is_not_finite_spoils_neither_log_nor_checkpoint(
    make_config, train, monkeypatch, save_every, kept
):
    config = make_config("dit", steps=3)
    whole = train(config, "whole")
    with monkeypatch.context() as broken:
        fail(broken, 5, None)
        with pytest.raises(FloatingPointError, match=r"got loss inf .*; nothing was updated"):
            train(config, save_every=save_every)
    assert logged() == [0, 1, 2, 3, 4]
    assert [path.name for path in saved()][-1:] == ([f"step-{kept:08d}"] if kept else [])
    assert_same(train(config, resume="latest" if kept else ""), whole)
    assert rows_of() == rows_of(WHOLE)


def test_every_row_is_logged_before_a_checkpoint_is_written(make_config, train, monkeypatch):
    rows, save = [], checkpoint.save

    def saving(directory, step, *rest, **options):
        rows.append((step, logged()[-1]))
        save(directory, step, *rest, **options)

    monkeypatch.setattr(checkpoint, "save", saving)
    train(make_config("dit", steps=3), save_every=2)
    assert rows == [(step, step - 1) for step in (2, 4, 6, 8, 9)]
