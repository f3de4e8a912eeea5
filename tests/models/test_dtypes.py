"""Whole models in other dtypes: what runs in float32 runs in each, and says nearly the same."""

import copy
from dataclasses import replace

import pytest
import torch
from models.tiny import (
    DRAW,
    INTERVAL,
    LEVEL,
    SCALE,
    every_family,
    image_families,
    levels_of,
    make_batch,
    make_model,
    noisy,
)
from training.tiny import PRIOR, assert_same, copies, make_blocks, make_data

from dbkernels.diffusion.samplers import SAMPLERS
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.training.trainer import Trainer

# twice the spacing of the dtype's numbers at 1, for each of a few roundings in a row
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.01, torch.float64: 1e-5}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def assert_near(actual, expected, dtype):
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max().clamp_min(1), error


@every_family
@each_dtype
def test_predictions_loss_and_gradients_are_those_of_float32_rounded(family, dtype):
    model = make_model(family)
    cast, batch = copy.deepcopy(model).to(dtype), make_batch(model)
    rounded = copy.deepcopy(cast).float()
    streams = set()

    def met(_, args, out):
        every = [args[0], *(out if isinstance(out, tuple) else (out,))]
        streams.update(tensor.dtype for tensor in every)

    for layer in cast.layers:
        layer.register_forward_hook(met)
    z, (level, interval) = noisy(model, batch), levels_of(model)
    made = [m.denoise(z, level, range(3), batch) for m in (cast, rounded)]
    assert_near(*made, dtype)
    assert streams == {dtype}
    losses = [m.loss(DRAW, level, SCALE, range(3), batch, interval) for m in (cast, rounded)]
    assert torch.float32 in {loss.dtype for loss in losses}
    assert_near(*losses, dtype)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(cast.named_parameters(), rounded.parameters(), strict=True):
        assert p.grad.dtype == dtype and p.grad.isfinite().all(), name
        size = q.grad.norm()
        assert (p.grad.double() - q.grad).norm() <= 5 * TOLERANCE[dtype] * size + 1e-3, name


@image_families
@each_dtype
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_and_evaluation(family, dtype, sampler):
    blocks = make_blocks(family).to(dtype)
    data = make_data()
    batch = {"image": torch.randn(2, 1, 4, 4), "label": torch.tensor([0, 2])}
    z = blocks.sample(batch, PRIOR.grid(4), DRAW, sampler=sampler)
    assert z.isfinite().all() and z.dtype in (torch.float32, dtype)
    found = blocks.evaluate(data)
    expected = make_blocks(family).evaluate(data)
    assert found.block_losses == pytest.approx(expected.block_losses, rel=TOLERANCE[dtype])


def worth(blocks, data):
    """Losses or bits of all blocks."""
    # the sampler's bits would take most of the time, and are not read
    found = blocks.evaluate(data, starts=0 if blocks.text == "gaussian" else None)
    return found.bits if blocks.text else sum(found.block_losses)


WAYS = [
    {"ema": 0.5},
    {"offload": "cpu", "prefetch": True},
    {"optimizer_in_backward": True, "clip": 0.0},
    {"accumulate": 2, "sharing": "copies"},
]


@every_family
@each_dtype
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_trains_goes_on_and_learns(family, dtype, settings):
    def trainer():
        blocks = make_blocks(family, sharing=sharing).to(dtype)
        return Trainer(blocks, data, steps=20, batch_size=8, lr=3e-3, **settings)

    data, settings = make_data(family=family), dict(settings)
    sharing = settings.pop("sharing", "joint")
    first, second = trainer(), trainer()
    before = worth(first.blocks, data)
    while first.step < 50:
        first.step_block(first.next_block())
    second.restore(copies(first), first.counters())
    for each in (first, second):
        each.run()
    assert_same(second, first)
    assert {p.dtype for p in first.blocks.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in first.blocks.parameters())
    assert worth(first.blocks, data) < 0.95 * before


@each_dtype
@pytest.mark.parametrize("recompute", POLICIES)
def test_every_policy_keeps_gradients_finite(dtype, recompute):
    model = make_model("dit")
    for layer in model.layers:
        layer.config = replace(layer.config, recompute=recompute)
    batch = make_batch(model)
    model.to(dtype).loss(DRAW, LEVEL, SCALE, (0, 1, 2), batch, INTERVAL).backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
