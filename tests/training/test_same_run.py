import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training.tiny import PRIOR, VIT, assert_same, families

import dbkernels.training.same_run as same_run
from dbkernels.ops.backend.library import Library
from dbkernels.training import checkpoint
from dbkernels.training.checkpoint import load, save
from dbkernels.training.log import read_log
from dbkernels.training.run import load_run
from dbkernels.training.run_config import PartitionConfig, RunConfig, read_config
from dbkernels.training.same_run import MAX_DIFFERENCES, require_same_config
from dbkernels.training.trainer_config import TrainerConfig

RUN, LATEST = Path("run"), {"resume": "latest"}


def newest(directory=RUN):
    return checkpoint.latest(directory / "checkpoints")


# another configuration


def test_the_same_config_passes(tmp_path):
    config = {"model": {"width": 8, "betas": (0.9, 0.95)}, "name": None, "rate": 1}
    _, state = load(save(tmp_path, 1, {}, {"config": config}))
    require_same_config(state["config"], config | {"rate": 1.0}, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"m": {"d": 8, "e": 2}}, {"m": {"d": 9, "e": 2}}, "^1 .*runs/s: m.d: saved 8, current 9$"),
        ({"a": None}, {}, "^1 settings differ .*: a: saved None, current 'nothing'$"),
        ({"s": "x"}, {"n": (1, 2), "s": "x"}, r": n: saved 'nothing', current \[1, 2\]$"),
        ({str(i): i for i in range(10)}, {}, f"^10 .*; {MAX_DIFFERENCES - 1}: saved .*'nothing'$"),
        ({}, {"path": Path("x")}, r"current\.path must be a value that JSON has, got Posix"),
    ],
)
def test_another_config_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message) as caught:
        require_same_config(old, new, Path("runs/s"))
    assert str(caught.value).count("saved") <= MAX_DIFFERENCES


def test_a_configuration_of_version_2_is_read_and_what_came_later_has_its_default():
    config = read_config(Path(__file__).parent / "version_2")
    trainer = TrainerConfig(steps=4, batch_size=4, lr=1e-2, ema=0.9, decay_on="all")
    expected = RunConfig(
        "vit", VIT, "data.npy", "none", 0.0, False, 0, PartitionConfig(), PRIOR, trainer
    )
    assert config == expected


# more steps


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [({}, 2, 4), ({"warmup": 3}, 3, 5), ({"steps_per_swap": 2, "offload": "cpu"}, 4, 7)],
)
@families
def test_more_steps_at_a_constant_rate_have_the_bits_of_a_run_that_was_always_longer(
    make_config, train, family, settings, first, second
):
    whole = train(make_config(family, steps=second, **settings), "whole")
    train(make_config(family, steps=first, **settings))
    longer = train(make_config(family, steps=second, **settings), **LATEST)
    assert_same(longer, whole)
    assert read_log(RUN / "log.jsonl") == read_log(Path("whole/log.jsonl"))
    # the run's own configuration is the longer one's by then, and an older checkpoint serves it
    for path in (RUN / "checkpoints").iterdir():
        assert load_run(RUN, which=str(path), device="cpu")[0].trainer.steps == second


def test_a_conventional_run_that_goes_on_draws_as_often_as_one_that_was_always_longer(
    make_config, train
):
    how = {"objective": "conventional", "partition": {"num_blocks": 1}, "ema": 0.0}
    whole = train(make_config("huginn", steps=5, **how), "whole")
    train(make_config("huginn", steps=3, **how))
    assert_same(train(make_config("huginn", steps=5, **how), **LATEST), whole)


@pytest.mark.parametrize(
    ("settings", "steps", "reason"),
    [
        ({"decay": "cosine"}, 6, "the rate falls by a cosine that ends with them"),
        ({"order": "sequential"}, 6, "blocks are trained one after another"),
        ({"steps_per_swap": 3}, 6, "the last turns were shorter than 3 steps"),
        ({}, 3, "a run becomes no shorter"),
    ],
)
def test_another_number_of_steps_is_refused_with_the_reason(
    make_config, train, settings, steps, reason
):
    train(make_config(**settings))
    message = f"steps must be 4 as in checkpoint .*step-00000012, for {reason}, got {steps}$"
    with pytest.raises(ValueError, match=message):
        train(make_config(steps=steps, **settings), **LATEST)


# other data


def write(path, images, labels):
    np.save(path, images)
    np.save(path.with_name(f"{path.stem}_labels.npy"), labels)


def test_data_may_move_where_they_are_the_same(make_config, train):
    whole = train(make_config(), "whole")
    train(make_config(), save_every=3)
    shutil.rmtree(RUN / "checkpoints" / "step-00000012")
    Path("elsewhere").mkdir()
    for name in ("data.npy", "data_labels.npy"):
        os.rename(name, f"elsewhere/{name}")
    assert_same(train(make_config(data="elsewhere/data.npy"), **LATEST), whole)
    assert load_run(RUN, device="cpu")[0].data == "elsewhere/data.npy"


def one_more(images, labels):
    return np.concatenate([images, images[:1]]), np.concatenate([labels, labels[:1]])


def a_bit(images, labels):
    images.view(np.uint8).reshape(-1)[77] ^= 1
    return images, labels


def a_label(images, labels):
    labels[3] = (labels[3] + 1) % 3
    return images, labels


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("change", [one_more, a_bit, a_label])
def test_other_data_are_refused_unless_the_caller_says_so(make_config, train, change, moved):
    train(make_config(steps=2))
    images, labels = change(np.load("data.npy"), np.load("data_labels.npy"))
    path = Path("new.npy" if moved else "data.npy")
    write(path, images, labels)
    config, told = make_config(data=str(path), steps=3), "data was [0-9a-f]{16} and is [0-9a-f]{16}"
    with pytest.raises(ValueError, match=f"^data must be that of checkpoint .*{told}.*ok goes on"):
        train(config, **LATEST)
    with pytest.warns(UserWarning, match=told):
        train(config, data_changed="ok", **LATEST)
    # from here on these are the run's
    train(make_config(data=str(path), steps=4), **LATEST)


def test_data_that_moved_from_a_checkpoint_without_their_digest_are_refused(
    make_config, train, monkeypatch
):
    with monkeypatch.context() as before:
        before.setattr("dbkernels.training.run.conditions", lambda *_: {})
        train(make_config(steps=2))
    train(make_config(steps=3), **LATEST)
    shutil.rmtree(newest())
    write(Path("new.npy"), np.load("data.npy"), np.load("data_labels.npy"))
    config = make_config(data="new.npy", steps=3)
    with pytest.raises(ValueError, match="elsewhere, and step-00000006 has no digest of them"):
        train(config, **LATEST)
    with pytest.warns(UserWarning, match="elsewhere"):
        train(config, data_changed="ok", **LATEST)


# other conditions


def test_what_moves_the_last_bits_is_recorded_and_said_when_it_is_another(
    make_config, train, monkeypatch
):
    train(make_config(steps=2))
    recorded = load(newest())[1]["conditions"]
    assert set(recorded) == {
        "samples", "data", "threads", "processes", "torch", "library", "device"
    }  # fmt: skip
    assert (recorded["samples"], recorded["threads"]) == (12, torch.get_num_threads())
    assert recorded["processes"] == 1
    other = {"threads": 99, "processes": 2, "torch": "1.0", "library": "none!", "device": "Device"}
    inner = same_run.conditions
    monkeypatch.setattr("dbkernels.training.run.conditions", lambda *a: inner(*a) | other)
    with pytest.warns(UserWarning) as told:
        train(make_config(steps=3), **LATEST)
    assert sorted(str(w.message) for w in told) == sorted(
        f"{key} was {recorded[key]} and is {value}: bits from here on may be others"
        for key, value in other.items()
    )


def test_the_library_counts_where_it_serves(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"library")
    monkeypatch.setattr(same_run, "PATH", tmp_path / "a")
    digest = same_run._library.__wrapped__
    monkeypatch.setattr(same_run, "library", lambda: Library(None))
    expected = hashlib.sha256(b"library").hexdigest()[:16]
    assert digest() == expected
    monkeypatch.setattr(same_run, "library", lambda: Library("This processor has no AVX2."))
    assert digest() == "none"
