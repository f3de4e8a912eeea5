"""Runs that a signal asks to end: they save, say so, and go on to the same bits."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from training.tiny import assert_same

from dbkernels.training import checkpoint
from dbkernels.training.log import read_log
from dbkernels.training.stop import ASKING, Stopped, StopSignals

RUN, WHOLE = Path("run"), Path("whole")
signals = pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)


def test_what_a_scheduler_a_terminal_and_a_person_send_is_answered():
    names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"}
    assert {number.name for number in ASKING} == names


@signals
@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (0, {}),
        (5, {"steps_per_swap": 3, "offload": "cpu", "prefetch": True}),
        (7, {"optimizer_in_backward": True, "clip": 0.0}),
    ],
)
def test_a_run_that_is_asked_to_end_saves_every_step_and_resumes_to_the_same_bits(
    make_config, train, number, step, settings
):
    before = [signal.getsignal(each) for each in ASKING]

    def ask(row):
        if row["step"] == step:
            os.kill(os.getpid(), number)

    config = make_config("dit", **settings)
    whole = train(config, "whole")
    with pytest.raises(Stopped, match=rf"^{number.name} ended the run at step \d+ of 12: --resume"):
        train(config, on_row=ask)
    newest = checkpoint.latest(RUN / "checkpoints")
    done = len(read_log(RUN / "log.jsonl"))
    # the step that was launched when the signal came is the last one
    assert newest.name == f"step-{done:08d}" and step < done <= step + 2
    assert [signal.getsignal(each) for each in ASKING] == before
    assert_same(train(config, resume="latest"), whole)
    assert read_log(RUN / "log.jsonl") == read_log(WHOLE / "log.jsonl")


def test_a_signal_at_the_last_step_comes_too_late(make_config, train):
    trainer = train(make_config(), on_row=lambda row: row["step"] < 11 or asked(signal.SIGTERM))
    assert trainer.step == trainer.total_steps


def asked(number):
    os.kill(os.getpid(), number)


def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_its_step(make_config, train):
    def twice(row):
        asked(signal.SIGINT), asked(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_config(), on_row=twice)


@signals
def test_a_second_signal_ends_a_process_at_once(number):
    script = (
        "import os, time\n"
        "from dbkernels.training.stop import StopSignals\n"
        "with StopSignals() as stop:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        f"    assert stop.asked == {int(number)}\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert ended.returncode == -number


def test_a_launcher_may_say_it_twice_and_the_rest_of_what_it_says_is_obeyed():
    before = [signal.getsignal(each) for each in ASKING]
    with StopSignals(twice=True) as stop:
        asked(signal.SIGTERM), asked(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        others = [each for each in ASKING if each != signal.SIGTERM]
        assert [signal.getsignal(each) for each in others] == before[1:]
    assert [signal.getsignal(each) for each in ASKING] == before
    with StopSignals(twice=True) as stop, pytest.raises(KeyboardInterrupt):
        asked(signal.SIGTERM), asked(signal.SIGINT)


def test_another_thread_than_the_first_is_asked_nothing():
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def run():
        with StopSignals() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    assert seen == [(None, before)]
