"""Workers, and the steps that they read ahead of."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from training.tiny import equal, make_data

from dbkernels.data.dataset import DatasetBatches
from dbkernels.data.formats import OneByOne
from dbkernels.data.images import ImageData, batch_indices
from dbkernels.data.workers import AHEAD, Workers

STEPS = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Odd(Dataset):
    """Does at one of its samples what it is told."""

    def __init__(self, does, index=7):
        self.does, self.index = does, index

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.index:
            return self.does()
        return {"n": index, "pid": os.getpid(), "threads": torch.get_num_threads()}


def raises():
    raise KeyError("lost")


@pytest.fixture
def make():
    made = []

    def make(data, count=2, steps=STEPS, at=0, **settings):
        workers = Workers(data, count, batch_size=4, seed=3, **settings)
        made.append(workers)
        workers.at = at
        workers.expect(lambda: iter(steps[workers.at :]))
        return workers

    yield make
    for workers in made:
        workers.close()
    assert not multiprocessing.active_children()


def take(workers, block, step):
    """As a trainer takes it: what is expected begins behind it then."""
    batch = workers.take(block, step)
    workers.at += 1
    return batch


def of_step(data, block, step):
    return data.batch(batch_indices(len(data), 4, seed=3, block=block, step=step))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_samples_are_those_that_the_seed_the_block_and_the_step_name(count, make):
    data = make_data()
    workers = make(data, count)
    for block, step in STEPS:
        assert equal(take(workers, block, step), of_step(data, block, step))


def test_other_processes_read_on_one_thread_each_and_read_ahead(make):
    workers, seen = make(DatasetBatches(Odd(lambda: {}, index=12)), steps=STEPS * 3), Counter()
    for block, step in STEPS:
        batch = take(workers, block, step)
        assert set(batch["threads"].tolist()) == {1} and len(set(batch["pid"].tolist())) == 1
        seen[batch["pid"][0].item()] += 1
    pids = {process.pid for process in multiprocessing.active_children()}
    assert set(seen) == pids and len(pids) == 2 and os.getpid() not in pids
    # so many steps and no more wait for whoever takes them
    assert len(workers._requests.asked) == 2 * AHEAD


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_images_come_to_a_gpu_as_bytes_and_become_what_a_model_reads(on_gpu, make):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 5), dtype=np.uint8)
    read = OneByOne(list(pixels), (3, 4, 5), lambda image: image)
    data = ImageData(read, torch.arange(9) % 3, 3)
    workers = make(data, on_gpu=on_gpu)
    batch = workers.take(0, 0)
    assert batch["image"].dtype == (torch.uint8 if on_gpu else torch.float32)
    assert equal(workers.finish(batch), of_step(data, 0, 0))


def test_a_step_that_nobody_expects_is_for_the_caller_and_changes_no_other(make):
    data = make_data()
    workers = make(data)
    assert equal(take(workers, 0, 0), of_step(data, 0, 0))
    assert workers.take(1, 2) is None and workers.take(0, 0) is None
    assert equal(take(workers, 1, 0), of_step(data, 1, 0))
    # a run that goes back, and one that goes on elsewhere
    for at in (0, 4, 1):
        workers.at = at
        for block, step in STEPS[at:]:
            assert equal(take(workers, block, step), of_step(data, block, step))
    assert workers.take(0, 3) is None
    assert len(multiprocessing.active_children()) == 2


def test_processes_begin_with_the_first_step_and_end_with_the_last(make):
    workers = make(make_data())
    assert not multiprocessing.active_children()
    workers.take(0, 0)
    assert len(multiprocessing.active_children()) == 2
    workers.close()
    assert not multiprocessing.active_children()
    assert equal(workers.take(0, 0), of_step(make_data(), 0, 0))


def test_torchs_own_generator_is_not_drawn_from(make):
    before = torch.get_rng_state()
    make(make_data()).take(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_thread_may_take_a_step(make):
    workers, found = make(make_data()), []
    thread = threading.Thread(target=lambda: found.append(workers.take(0, 0)))
    thread.start(), thread.join()
    assert equal(found[0], of_step(make_data(), 0, 0))


LOST = r"the samples of block 0 at its step \d must be read without an error, got KeyError: 'lost'"


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (raises, f"{LOST}; workers=0 shows where"),
        (
            lambda: {"n": torch.zeros(2)},
            "sample 7 must have {'n': .* as sample 0, got {'n': '.2,. torch.float32'}",
        ),
        (lambda: 7, "sample 7 must be a dict, got int"),
    ],
    ids=["raises", "shape", "kind"],
)
def test_a_sample_that_cannot_be_used_is_one_sentence_and_the_next_step_is_read(
    does, message, make
):
    data = DatasetBatches(Odd(does))
    steps = [(0, step) for step in range(3)]  # all samples of an epoch
    workers, refused = make(data, steps=steps), 0
    for block, step in steps:
        try:
            take(workers, block, step)
        except ValueError as error:
            refused += 1
            workers.at += 1
            with pytest.raises(ValueError, match=message):
                raise error
            assert "\n" not in str(error)
    assert refused == 1


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL, as where memory runs out"),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            r"SIGBUS, as where /dev/shm is full \(\d+ MiB",
        ),
        (lambda: os._exit(3), "exit code 3"),
    ],
    ids=["killed", "bus", "exit"],
)
def test_a_worker_that_dies_is_one_sentence_and_the_others_end(does, message, make):
    workers = make(DatasetBatches(Odd(does)), steps=[(0, step) for step in range(3)])
    message = f"workers must live as long as the run reads, got one that ended with {message}"
    with pytest.raises(ChildProcessError, match=message) as raised:
        for step in range(3):
            take(workers, 0, step)
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("by", [os.kill, lambda *told: os.system("kill -{1} {0}".format(*told))])
def test_a_worker_that_was_asked_to_end_is_no_error(by, make):
    data = make_data()
    workers = make(data, steps=STEPS * 2)
    take(workers, 0, 0)
    for process in multiprocessing.active_children():
        by(process.pid, signal.SIGTERM.value)
    time.sleep(0.2)
    # some were read before
    found = [take(workers, block, step) for block, step in STEPS[1:]]
    assert None in found
    for (block, step), batch in zip(STEPS[1:], found, strict=True):
        assert batch is None or equal(batch, of_step(data, block, step))


def test_a_death_interrupts_nothing_but_the_next_read(make):
    workers = make(make_data())
    before = signal.getsignal(signal.SIGCHLD)
    workers.take(0, 0)
    assert signal.getsignal(signal.SIGCHLD) is before
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)  # here torch would raise


def test_ctrl_c_is_for_the_run_to_answer(make):
    data, steps = make_data(), [(block, step) for step in range(12) for block in (0, 1)]
    workers = make(data, steps=steps)
    for block, step in steps[:2]:  # each has begun
        take(workers, block, step)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    for block, step in steps[2:]:
        assert equal(take(workers, block, step), of_step(data, block, step))


@pytest.mark.parametrize("count", [0, -1, 2000])
def test_rejects_a_number_of_workers_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"workers must be at .*, got {count}"):
        Workers(make_data(), count, batch_size=4, seed=0)
