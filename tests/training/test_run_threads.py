"""The threads of a run: found once, said in its log, and kept by whoever goes on."""

import json
from pathlib import Path

import pytest
import torch

from dbkernels.training import run, threads
from dbkernels.training.log import read_log

RUN = Path("run")


@pytest.fixture
def tried(monkeypatch):
    """Three threads that torch has, of which two are found to be the fastest."""
    trials, before = [], torch.get_num_threads()

    def fastest(step):
        step()
        trials.append(1)
        return 2

    monkeypatch.setattr(threads, "fastest_threads", fastest)
    torch.set_num_threads(3)
    yield trials
    torch.set_num_threads(before)


def seen(train, config, **options):
    """With how many threads steps ran, and what a checkpoint says."""
    found = []
    train(config, on_row=lambda row: found.append(torch.get_num_threads()), **options)
    [path] = sorted((RUN / "checkpoints").iterdir())[-1:]
    return set(found), json.loads((path / "state.json").read_text())["state"]["conditions"]


def test_a_new_run_has_what_is_fastest_and_says_so_in_its_first_row(make_config, train, tried):
    used, said = seen(train, make_config())
    assert used == {2} and said["threads"] == 2 and tried == [1]
    assert torch.get_num_threads() == 3
    assert [row.get("threads") for row in read_log(RUN / "log.jsonl")] == [2] + [None] * 11


def test_a_run_that_goes_on_keeps_its_own_number(make_config, train, tried, recwarn):
    train(make_config(steps=2), threads=1)
    used, said = seen(train, make_config(steps=4), resume="latest")
    assert used == {1} and said["threads"] == 1 and tried == []
    assert not [w for w in recwarn if "threads" in str(w.message)]


def test_another_number_that_is_asked_for_is_said(make_config, train, tried):
    train(make_config(steps=2), threads=1)
    with pytest.warns(UserWarning, match="threads was 1 and is 2: bits from here on"):
        used, _ = seen(train, make_config(steps=4), resume="latest", threads=2)
    assert used == {2}


@pytest.mark.parametrize("settings", [{}, {"optimizer_in_backward": True, "clip": 0.0}])
def test_trying_moves_nothing(make_config, train, tried, settings):
    first = train(make_config(**settings), "found")
    second = train(make_config(**settings), "given", threads=2)
    for name, tensors in first.tensors().items():
        assert all(torch.equal(t, second.tensors()[name][k]) for k, t in tensors.items())


def test_nothing_is_tried_where_blocks_wait_elsewhere(make_config, train, tried):
    used, _ = seen(train, make_config(offload="cpu"))
    assert used == {3} and tried == []


@pytest.mark.parametrize("number", [-1, 1025])
def test_rejects_a_number_of_threads(make_config, train, number):
    with pytest.raises(ValueError, match="threads must be at"):
        train(make_config(), threads=number)
    assert not RUN.exists() and run
