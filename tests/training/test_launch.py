"""A launch looks at no value on the device, and brings nothing there but by its staging."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from training.tiny import equal, make_trainer

import dbkernels.training.trainer as module
from dbkernels.data.augment import mirror, shift
from dbkernels.training.block_order import BlockOrder

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


SETTINGS = [
    {},
    {"accumulate": 2, "autocast": True},
    {"optimizer_in_backward": True, "clip": 0.0},
    {"offload": "cpu"},
    {"offload": "cpu", "prefetch": True, "sharing": "copies"},
    {"clip": 0.0, "warmup": 2, "decay": "cosine", "steps_per_swap": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["vit", "dit"])
def test_a_launch_waits_for_nothing(family, settings, monkeypatch):
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
    assert equal(trainer.tensors()["ema"], plain.tensors()["ema"])


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
