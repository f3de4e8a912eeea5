"""A launch waits for nothing: the row of a step is read when the next one was launched.

It looks at no value on the device, and brings nothing there but by its staging.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from training.tiny import CPU, IN_BACKWARD, PREFETCH, assert_same, augment, families, make_trainer

import dbkernels.training.samples as module
from dbkernels.training.block_order import BlockOrder
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.pending import Pending
from dbkernels.training.trainer import Trainer

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
        CPU,
        {**PREFETCH, "sharing": "copies"},
        {"clip": 0.0, "warmup": 2, "decay": "cosine", "steps_per_swap": 2},
        {"optimizer": "muon"},
        {"optimizer": "muon", **IN_BACKWARD},
    ],
    ids=str,
)
@families
def test_steps_are_launched_without_a_wait_and_their_rows_read_late(family, settings, monkeypatch):
    monkeypatch.setattr(module, "batch_indices", on_host(module.batch_indices))
    monkeypatch.setattr(BlockOrder, "block", on_host(BlockOrder.block))
    trainer, plain = (make_trainer(family, ema=0.9, **settings) for _ in range(2))
    trainer.augment = plain.augment = augment
    trainer.samples.data = data = Data(trainer.samples.data)
    with NoWaiting():
        pending = [trainer.launch(trainer.next_block()) for _ in range(5)]
    each = len(trainer.blocks.model.config.fields())
    assert data.put == 5 * each * settings.get("accumulate", 1)
    rows = [plain.step_block(plain.next_block()) for _ in range(5)]
    assert [each.row() for each in pending] == rows
    assert_same(trainer, plain)


@pytest.mark.parametrize(
    "look",
    [
        torch.Tensor.item,
        bool,
        lambda loss: torch.tensor(0.5) * loss,
        lambda loss: torch.equal(loss, loss),
    ],
    ids=["item", "bool", "tensor", "equal"],
)
def test_a_look_at_a_value_is_noticed_here(look):
    def objective(*arguments):
        loss = DiffusionBlocks.loss(*arguments)
        look(loss)
        return loss

    trainer, looking = make_trainer(), make_trainer(objective=objective)
    looking.samples.data = Data(looking.samples.data)
    pending = trainer.launch(trainer.blocks[0])
    for call in (pending.row, lambda: looking.launch(looking.blocks[0])):
        with NoWaiting(), pytest.raises(AssertionError, match="in a launch"):
            call()


def test_a_run_reads_each_row_behind_the_next_launch(monkeypatch):
    happened, trainer = [], make_trainer("dit", steps=1)
    for owner, name in ((Trainer, "launch"), (Pending, "row")):
        inner = getattr(owner, name)

        def told(*args, name=name, inner=inner):
            happened.append(name)
            return inner(*args)

        monkeypatch.setattr(owner, name, told)
    trainer.run()
    # the first has no step before it
    assert happened == ["launch", *["launch", "row"] * 2, "row"]


def test_steps_that_are_timed_are_waited_for(monkeypatch):
    waited = []
    trainer = make_trainer(**CPU, steps_per_swap=0, steps=9)
    monkeypatch.setattr(Pending, "wait", lambda launched: waited.append(trainer.step))
    for _ in range(8):
        trainer.launch(trainer.next_block())
    assert waited == [1, 2, 3, 4, 5]
