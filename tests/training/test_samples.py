"""A trainer whose samples come from workers, or from a stream."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training.tiny import (
    PREFETCH,
    assert_same,
    assert_same_steps,
    copies,
    equal,
    families,
    make_blocks,
    make_data,
    make_trainer,
    short_of_memory,
    steps,
    weights,
)

from dbkernels.data.workers import Workers
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.pending import HeldSamples
from dbkernels.training.samples import Here, open_samples
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

SETTINGS = {"steps": 4, "batch_size": 4, "lr": 1e-2}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    assert not multiprocessing.active_children()


class Pairs(Dataset):
    """Tiny data as a Dataset of tuples; of one index it does what it is told."""

    def __init__(self, odd=lambda: None):
        whole = make_data()
        self.batch_of_all, self.odd = whole.batch(torch.arange(len(whole))), odd

    def __len__(self):
        return 10

    def __getitem__(self, index):
        found = index == 7 and self.odd()
        return found or (self.batch_of_all["image"][index], int(self.batch_of_all["label"][index]))


def make_other(data, **settings):
    """A trainer of the same blocks on other data."""
    return Trainer(make_blocks(), data, **{**SETTINGS, **settings})


@pytest.mark.parametrize("workers", [1, 4])
@families
def test_workers_change_no_bit_of_any_family(family, workers):
    plain, other = make_trainer(family, ema=0.9), make_trainer(family, ema=0.9, workers=workers)
    plain.run(), other.run()
    assert_same(other, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 2},
        {"order": "sequential"},
        {"steps_per_swap": 2, **PREFETCH},
        {"steps_per_swap": 0, **PREFETCH},
        {"sharing": "copies"},
    ],
    ids=str,
)
def test_workers_change_no_bit_whatever_the_order(settings):
    plain, other = (make_trainer(workers=n, **settings) for n in (0, 2))
    plain.run(), other.run()
    if settings.get("steps_per_swap") == 0:  # a matter of time, which may differ
        assert plain.counters()["groups"] == other.counters()["groups"]
        return
    assert_same(other, plain)


@pytest.mark.parametrize("settings", [{}, {"order": "sequential"}], ids=str)
def test_all_steps_of_a_run_are_read_by_workers_that_begin_once(settings, monkeypatch):
    begun, inner = [], Workers._begin
    monkeypatch.setattr(Workers, "_begin", lambda self: begun.append(inner(self)))
    monkeypatch.setattr(Here, "of_step", None)  # what reads a step that no worker has
    trainer = make_trainer(workers=2, **settings)
    trainer.run()
    assert trainer.step == 12 and len(begun) == 1


@pytest.mark.parametrize("order", [[0, 0, 2, 1, 1, 0], [2, 2, 2], [1, 0, 2, 0, 1, 2]])
def test_steps_on_any_block_have_their_samples_and_then_the_run_goes_on(order):
    plain, other = make_trainer(steps=6), make_trainer(steps=6, workers=2)
    assert_same_steps(other, plain, order)
    assert_same_steps(other, plain)
    # and behind its end
    assert_same_steps(other, plain, [1, 2])
    other.close()


@pytest.mark.parametrize("counts", [(0, 1), (1, 4), (4, 0), (4, 1)])
def test_a_run_goes_on_with_another_number_of_workers(counts):
    whole, first, second = (
        make_other(Pairs(), keys=("image", "label"), workers=n, ema=0.9) for n in (0, *counts)
    )
    whole.run()
    for _ in range(5):
        first.step_block(first.next_block())
    saved = copies(first), first.counters()
    steps(second, [0, 1])
    second.restore(*saved)
    first.close()
    second.run()
    assert_same(second, whole)


def test_tuples_with_keys_are_the_data_that_dicts_are():
    plain, other = make_trainer(), make_other(Pairs(), keys=("image", "label"))
    plain.run(), other.run()
    assert_same(other, plain)


def test_a_step_that_is_refused_is_read_again():
    def objective(blocks, block, batch, draw):
        loss = DiffusionBlocks.loss(blocks, block, batch, draw)
        return loss * broken.pop() if broken else loss

    broken: list[float] = []
    plain, other = make_trainer(), make_trainer(workers=2, objective=objective)
    steps(other, [0, 1, 2]), steps(plain, [0, 1, 2])
    broken.append(float("nan"))
    block = other.next_block()
    with pytest.raises(FloatingPointError):
        other.step_block(block)
    assert_same_steps(other, plain)
    other.close()


def test_a_batch_that_finds_no_room_is_cut_of_what_was_read():
    objective, met = short_of_memory(2)
    plain, other = make_trainer(accumulate=2), make_trainer(workers=2, objective=objective)
    plain.run()
    with pytest.warns(UserWarning, match="they have 2 from now on"):
        other.run()
    assert {count for count, *_ in met} == {2, 4}
    ours, theirs = weights(other), weights(plain)
    assert equal(ours, theirs)


def test_held_samples_are_filled_from_one_piece_of_a_workers_batch():
    config = TrainerConfig(**SETTINGS)
    here, workers = (
        open_samples(make_data(), None, n, config, device=torch.device("cpu")) for n in (0, 2)
    )
    workers.expect(lambda: iter([(1, 0), (1, 1)]))
    held = HeldSamples()
    for step in range(2):
        held.fill(next(workers.of_step(1, step, lambda tensor: tensor)(4)))
        expected = next(here.of_step(1, step, lambda tensor: tensor)(4))
        assert equal(next(held.pieces(4)), expected)
        assert len(list(held.pieces(3))) == 2
    workers.close()


def broken():
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        (broken, ValueError, "must be read without an error, got OSError: the disk is gone; work"),
        (lambda: (torch.zeros(2), 1), ValueError, r"sample 7 must have .* as sample 0, got {.*2,"),
        (lambda: os._exit(3), ChildProcessError, "got one that ended with exit code 3"),
    ],
)
def test_a_run_ends_with_its_workers_where_one_fails(odd, error, message):
    trainer = make_other(Pairs(odd), keys=("image", "label"), workers=2)
    with pytest.raises(error, match=message):
        trainer.run()
    assert not multiprocessing.active_children()


def test_workers_end_when_the_trainer_closes_and_begin_when_it_goes_on():
    trainer = make_trainer(workers=2)
    assert not multiprocessing.active_children()
    for _ in range(2):
        trainer.step_block(trainer.next_block())
        assert len(multiprocessing.active_children()) == 2
        trainer.close()
        assert not multiprocessing.active_children()


SCRIPT = """if True:
    import torch
    from torch.utils.data import Dataset
    from dbkernels import DiffusionBlocks, Trainer, ViT
    class Digits(Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return torch.full((1, 8, 8), i / 64), i % 10
    torch.manual_seed(0)
    blocks = DiffusionBlocks(ViT.from_preset("digits"), num_blocks=3)
    trainer = Trainer(blocks, Digits(), keys=("image", "label"), steps=500, batch_size=8, workers=2)
    for _ in range(4):
        trainer.step_block(trainer.next_block())
    print(*(p.pid for p in __import__("multiprocessing").active_children()), flush=True)
    {end}
"""


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "end", ["pass", "raise SystemExit(3)", "__import__('os').kill(__import__('os').getpid(), 9)"]
)
def test_a_program_that_ends_without_a_close_leaves_no_worker(end):
    script = SCRIPT.replace("{end}", end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2, done.stderr
    assert done.returncode == {"p": 0, "r": 3, "_": -signal.SIGKILL}[end[0]], done.stderr
    deadline = time.time() + 30
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


SPAWNED = """if True:
    import torch
    from dbkernels import DiffusionBlocks, Trainer, ViT, open_data
    def losses(workers):
        torch.manual_seed(0)
        blocks = DiffusionBlocks(ViT.from_preset("digits"), num_blocks=3)
        data = open_data("data.npz")
        trainer = Trainer(blocks, data, steps=1, batch_size=8, workers=workers)
        found = [trainer.step_block(trainer.next_block())["loss"] for _ in range(3)]
        trainer.close()
        return found
    if __name__ == "__main__":
        torch.multiprocessing.set_start_method("spawn")
        with open("other.npz", "rb"):  # has a number that a file of the data has there
            assert losses(2) == losses(0)
"""


def test_workers_that_begin_anew_read_the_same_files(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(24) % 3)
    np.savez(tmp_path / "other.npz", images=0 * images, labels=np.arange(24) % 3)
    (tmp_path / "script.py").write_text(SPAWNED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [-1, 2000])
def test_rejects_a_number_of_workers_that_cannot_be(workers):
    with pytest.raises(ValueError, match=f"workers must be at .*, got {workers}"):
        make_trainer(workers=workers)


# streams


def forever(loader):
    while True:
        yield from loader


def make_loader(**settings):
    images, labels = Pairs().batch_of_all.values()
    return DataLoader(TensorDataset(images, labels), 4, drop_last=True, **settings)


class Stateful:
    """Batches that go on from a place; it tells how many it made."""

    def __init__(self):
        self.at = self.made = 0

    def __iter__(self):
        batches = list(make_loader())
        while True:
            images, labels = batches[self.at % len(batches)]
            self.at, self.made = self.at + 1, self.made + 1
            yield {"image": images, "label": labels}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def make_streamed(source=None, **settings):
    keys = None if isinstance(source, Stateful) else ("image", "label")
    return make_other(forever(make_loader()) if source is None else source, keys=keys, **settings)


def test_a_step_has_the_next_batch_of_a_stream_whatever_its_block():
    met = []

    def objective(blocks, block, batch, draw):
        met.append(batch["image"])
        return DiffusionBlocks.loss(blocks, block, batch, draw)

    trainer = make_streamed(objective=objective)
    steps(trainer, [2, 0, 0])
    images = [images for images, _ in make_loader()]
    assert all(torch.equal(*each) for each in zip(met, [*images, images[0]], strict=True))
    assert trainer.counters()["stream"] == {"batches": 3}


@pytest.mark.parametrize("make", [lambda: forever(make_loader()), Stateful])
def test_a_streamed_run_goes_on_to_the_bits_of_one_that_never_stopped(make):
    whole, first = make_streamed(make()), make_streamed(make())
    second = make_streamed(source := make())
    whole.run()
    for _ in range(5):
        first.step_block(first.next_block())
    second.restore(copies(first), first.counters())
    second.run()
    assert_same(second, whole)
    if isinstance(source, Stateful):  # it skips, and reads none again
        assert source.made == whole.total_steps - 5


def test_micro_batches_of_a_stream_are_pieces_of_its_batch():
    whole, cut = make_streamed(), make_streamed(accumulate=2)
    whole.run(), cut.run()
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def test_a_stream_that_runs_out_ends_the_run_with_what_to_do():
    trainer = make_streamed(make_loader())
    with pytest.raises(ValueError, match="got its end after 2: give a generator that begins it ag"):
        trainer.run()
    assert trainer.step == 2


def test_a_refused_step_has_read_its_batch():
    trainer = make_streamed(objective=lambda blocks, *_: blocks.device_loss)
    trainer.blocks.device_loss = next(trainer.blocks.parameters()).sum() * float("nan")
    with pytest.raises(FloatingPointError):
        trainer.step_block(trainer.blocks[0])
    assert trainer.step == 0 and trainer.counters()["stream"] == {"batches": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_streamed(workers=2), "workers must be 0 for the stream generator, whose own"),
        (lambda: make_other(make_data(), keys=("a",)), "keys must be None for ImageData"),
        (lambda: make_other(7), "a dataset must be map-style, .*, got int"),
    ],
)
def test_rejects_settings_that_do_not_go_with_the_data(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_of_a_stream_is_for_a_stream_alone():
    streamed, plain = make_streamed(), make_trainer()
    with pytest.raises(ValueError, match=r"data must be a stream, as .* is, got ImageData"):
        plain.restore(copies(streamed), streamed.counters())
    with pytest.raises(ValueError, match="a checkpoint of a stream must say how much of it was re"):
        streamed.restore(copies(plain), plain.counters())
    counters = streamed.counters() | {"stream": {"batches": 1, "more": 2}}
    with pytest.raises(ValueError, match="the place of the stream generator must have batches, g"):
        streamed.restore(copies(streamed), counters)
    steps(streamed, [0])
    with pytest.raises(ValueError, match="stream generator must be new to go on behind 0 batches"):
        streamed.restore(copies(streamed), streamed.counters() | {"stream": {"batches": 0}})


def test_a_data_set_of_dicts_is_evaluated_as_the_data_are():
    class Dicts(Pairs):
        def __getitem__(self, index):
            return dict(zip(("image", "label"), super().__getitem__(index), strict=True))

    blocks = make_blocks()
    assert blocks.evaluate(Dicts()) == blocks.evaluate(make_data())
    assert blocks.loss_at(Dicts(), 1.0) == blocks.loss_at(make_data(), 1.0)
