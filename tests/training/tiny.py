"""Tiny runs for tests, and when two are the same: seconds are spent on what a test asks."""

import json
import shutil
import weakref
from dataclasses import dataclass, replace

import pytest
import torch

from dbkernels.data.augment import mirror, shift
from dbkernels.data.captions import CaptionedImages
from dbkernels.data.images import ImageData
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models import (
    FAMILIES,
    ARConfig,
    DiTConfig,
    HuginnConfig,
    MDMConfig,
    MMDiTConfig,
    ViTConfig,
)
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

PRIOR = LogNormal()
SIZES = {"dim": 16, "depth": 3, "num_heads": 2, "image_size": 4, "channels": 1, "num_classes": 3}
DIT = DiTConfig(**SIZES)
VIT = ViTConfig(**SIZES, patch=2, mlp_hidden=32, cond_dim=8)
MMDIT = {name: SIZES[name] for name in ("dim", "depth", "num_heads", "image_size", "channels")}
TEXT = {"dim": 16, "depth": 3, "num_heads": 2, "mlp_hidden": 32, "cond_dim": 8}
TEXT |= {"length": 24, "vocabulary": 3}
CONFIGS = {
    "vit": VIT,
    "dit": DIT,
    "mmdit": MMDiTConfig(parallel=1, text_length=3, text_dim=5, pooled_dim=2, **MMDIT),
    "mdm": MDMConfig(**TEXT),
    "ar": ARConfig(**TEXT),
    "huginn": HuginnConfig(**TEXT, prelude=1, coda=1, recurrences=3, truncation=2),
}
PROCESSES = {family: FAMILIES[family].process for family in CONFIGS} | {"vit": PRIOR}
families = pytest.mark.parametrize("family", CONFIGS)
IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}
CPU = {"offload": "cpu"}
PREFETCH = {"offload": "cpu", "prefetch": True}


@dataclass(frozen=True)
class Text:
    """Windows of text, as a trainer and an evaluation read them."""

    token: torch.Tensor
    vocabulary: int

    @property
    def length(self):
        return self.token.shape[1]

    def __len__(self):
        return len(self.token)

    def batch(self, indices, put=lambda tensor: tensor):
        return {"token": put(self.token[indices])}


def make_data(count=10, family="vit"):
    random = torch.Generator().manual_seed(5)
    if "token" in (fields := CONFIGS[family].fields()):
        # low ids come more often: there is something to learn
        tokens = torch.minimum(*(fields["token"].made(count, random) for _ in range(2)))
        return Text(tokens, CONFIGS[family].vocabulary)
    images = torch.randn(count, 1, 4, 4, generator=random).numpy()
    if "text" in fields:
        return CaptionedImages(
            images, *(fields[name].made(count, random).numpy() for name in ("text", "pooled"))
        )
    return ImageData(images, torch.arange(count) % 3, 3)


def make_blocks(family="vit", num_blocks=3, sharing="joint", dim=16, **settings):
    """Always of the same weights."""
    torch.manual_seed(1)
    model = FAMILIES[family].model(replace(CONFIGS[family], dim=dim))
    settings = {"process": PROCESSES[family], "sharing": sharing, **settings}
    return DiffusionBlocks(model, num_blocks, **settings)


def make_trainer(
    family="vit", num_blocks=3, sharing="joint", objective=None, frozen=None, device=None, **config
):
    """A trainer at its first step; parameters with `frozen` in their names are not trained."""
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, **config}
    cuda = device is not None and device.type == "cuda"
    # a GPU has kernels for heads of no less
    blocks = make_blocks(family, num_blocks, sharing, dim=64 if cuda else 16)
    if cuda and settings.get("offload", "none") == "none":
        blocks = blocks.to(device)
    for name, parameter in blocks.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return Trainer(blocks, make_data(family=family), objective=objective, device=device, **settings)


def _forget(config):
    del config["model"]["positions"], config["trainer"]["optimizer"], config["trainer"]["decay_on"]


def make_older(directory):
    """Write a run's files as version 2 did, which knew one order of positions and one optimizer."""
    paths = (directory / "checkpoints").iterdir()
    for path in paths:
        tensors, state = checkpoint.load(path)
        _forget(state["config"])
        shutil.rmtree(path)
        counters = {"config": state["config"], "counters": state["counters"]}
        step = state["counters"]["step"]
        checkpoint.save(directory / "checkpoints", step, tensors, {"version": 2, **counters})
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"version": 2}
    _forget(config)
    file.write_text(json.dumps(config))


def augment(batch, draw):
    if "image" not in batch:
        return batch
    return shift(mirror(batch, draw), draw, pixels=1)


def no_room_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_room_on_the_host():
    # what torch itself says
    torch.empty(2**60, dtype=torch.uint8)


def no_room_in_python():
    raise MemoryError


NO_ROOM = (no_room_on_a_gpu, no_room_on_the_host, no_room_in_python)


def short_of_memory(fits, fail=no_room_on_a_gpu):
    """An objective with room for so many samples.

    And what it met: sizes, draws, and how many losses that found no room were alive.
    """
    met, failed = [], []

    def objective(blocks, block, batch, draw):
        alive = sum(loss() is not None for loss in failed)
        met.append((len(batch["label"]), draw, alive))
        loss = DiffusionBlocks.loss(blocks, block, batch, draw)
        if len(batch["label"]) > fits:
            failed.append(weakref.ref(loss))
            fail()
        return loss

    return objective, met


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.blocks.named_parameters()}


def copies(trainer):
    """All that a checkpoint holds, by group."""
    return {
        group: {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        for group, tensors in trainer.tensors().items()
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def assert_holds(trainer, tensors):
    """All that a checkpoint holds is what `copies` once gave."""
    ours = copies(trainer)
    assert ours.keys() == tensors.keys()
    for group, expected in tensors.items():
        assert equal(ours[group], expected), group


def assert_same(trainer, other):
    """In all that a checkpoint holds."""
    assert_holds(trainer, copies(other))
    assert trainer.counters() == other.counters()


def steps(trainer, order):
    """Rows of steps on blocks in an order, each waited for."""
    return [trainer.step_block(trainer.blocks[index]) for index in order]


def assert_same_steps(trainer, other, order=None, rel=0.0):
    """Of blocks in an order, or of the rest of the run; then in all that a checkpoint holds.

    All steps of the first are launched before a row of theirs is read; rows differ by `rel`.
    """
    count = trainer.total_steps - trainer.step if order is None else len(order)
    pending, rows = [], []
    for index in range(count):
        ours, theirs = (
            t.next_block() if order is None else t.blocks[order[index]] for t in (trainer, other)
        )
        pending.append(trainer.launch(ours))
        rows.append(other.step_block(theirs))
    for each, row in zip(pending, rows, strict=True):
        assert each.row() == pytest.approx(row, rel=rel, abs=0)
    assert_same(trainer, other)
