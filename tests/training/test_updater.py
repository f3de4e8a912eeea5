from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import nn
from training.tiny import equal, make_trainer, weights

from dbkernels.memory.measure import measure_peak
from dbkernels.models import ViT, ViTConfig
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer import Trainer
from dbkernels.training.updater import OptimizerAfterBackward, OptimizerInBackward, updater

IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}


def make_groups(count=2):
    torch.manual_seed(2)
    return [
        ParamGroup({f"w{i}": nn.Parameter(torch.randn(3))}, total=8, weight_decay=0.1, ema=0.5)
        for i in range(count)
    ]


def tensors(groups):
    return [tensor.detach().clone() for group in groups for tensor in group.tensors()]


@pytest.mark.parametrize("family", ["vit", "dit"])
@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_in_the_backward_and_after_it_give_the_same_bits(family, sharing):
    settings = {"ema": 0.9, "warmup": 1, "sharing": sharing}
    after = make_trainer(family, clip=0.0, **settings)
    inside = make_trainer(family, **IN_BACKWARD, **settings)
    for index in (0, 1, 0, 2, 1):
        row = inside.step_block(inside.blocks[index])
        assert row == pytest.approx(after.step_block(after.blocks[index]), rel=1e-5)
    for group, expected in after.tensors().items():
        assert equal(inside.tensors()[group], expected), group


def test_in_the_backward_gradients_are_gone_before_the_next_layers_are_there():
    trainer, alive = make_trainer(num_blocks=1, **IN_BACKWARD), []

    def count(*_):
        alive.append(sum(p.grad is not None for p in trainer.blocks.parameters()))

    for layer in trainer.blocks.model.layers:
        layer.register_full_backward_pre_hook(count)
    trainer.step_block(trainer.blocks[0])
    assert alive == [0, 0, 0]


def deep_trainer(**settings):
    """Of eight layers in one block, whose gradients outweigh all else."""
    config = ViTConfig(
        image_size=4, patch=2, channels=1, num_classes=3, dim=64, depth=8, num_heads=2,
        mlp_hidden=256, cond_dim=64,
    )  # fmt: skip
    tiny = make_trainer(num_blocks=1, **settings)
    return Trainer(DiffusionBlocks(ViT(config), 1), tiny.data, **asdict(tiny.config))


def test_a_step_with_the_optimizer_in_the_backward_peaks_lower_by_all_but_one_layers_gradients():
    peaks = {}
    for name, settings in (("after", {"clip": 0.0}), ("inside", IN_BACKWARD)):
        trainer = deep_trainer(**settings)
        step = partial(trainer.step_block, trainer.blocks[0])
        step()
        optimizers = [group.optimizer for group in trainer.groups.values()]
        peaks[name] = measure_peak(step, model=trainer.blocks, optimizers=optimizers)
    layer = sum(p.nbytes for p in trainer.blocks.model.layers[0].parameters())
    assert 6 * layer < peaks["after"].total_bytes - peaks["inside"].total_bytes < 8 * layer
    assert peaks["inside"].by_category["gradients"] <= 1.1 * layer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_in_the_backward_a_loss_that_is_not_finite_moves_nothing(value):
    def objective(blocks, block, batch, draw):
        return blocks.model.head.weight.sum() + value

    trainer = make_trainer(objective=objective, ema=0.9, **IN_BACKWARD)
    before = weights(trainer), dict(trainer.tensors()["ema"])
    with pytest.raises(FloatingPointError, match="the loss must be finite"):
        trainer.step_block(trainer.blocks[1])
    assert equal(weights(trainer), before[0]) and equal(trainer.tensors()["ema"], before[1])


# of a finite loss whose gradient is not, and of a gradient of a loss that is not
NOT_FINITE = {
    "gradient": lambda w: (w * 0).sqrt().sum() * 0,
    "infinite gradient": lambda w: (w * 0).sum().sqrt(),
    "loss": lambda w: w.sum() + torch.inf,
    "loss and gradient": lambda w: w.sum() * torch.nan,
}


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_after_the_backward_nothing_is_updated_where_loss_or_gradient_is_not_finite(name, clip):
    groups = make_groups()
    before, after = tensors(groups), OptimizerAfterBackward(clip, "cpu")
    for group in groups:
        group.prepare(0.1)
    ours = [next(iter(group.parameters.values())) for group in groups]
    loss = ours[0].sum() + NOT_FINITE[name](ours[1])
    after.backward(loss)
    norm = after.finish(loss.detach(), groups)
    assert torch.isfinite(loss) == ("loss" not in name)
    assert not torch.isfinite(loss + norm)
    assert all(map(torch.equal, tensors(groups), before))
    assert all(weight.grad is None for weight in ours)


@pytest.mark.parametrize("in_backward", [False, True])
def test_updates_that_follow_one_that_was_not_finite_move_nothing_until_they_are_to(in_backward):
    groups = make_groups(1)
    each = updater(in_backward, 0.0, groups, "cpu")
    weight = next(iter(groups[0].parameters.values()))

    def update(factor):
        groups[0].prepare(0.1)
        loss = weight.sum() * factor
        each.backward(loss)
        return each.finish(loss.detach(), groups)

    before = tensors(groups)
    update(torch.nan)
    for _ in range(2):
        assert torch.isnan(update(1.0))
        assert all(map(torch.equal, tensors(groups), before))
    each.go_on()
    assert torch.isfinite(update(1.0))
    assert not any(map(torch.equal, tensors(groups), before))


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("settings", [{}, {"clip": 0.0}, {"accumulate": 2}])
def test_a_step_updated_after_the_backward_is_refused_and_moves_nothing(name, settings):
    def objective(blocks, block, batch, draw):
        return NOT_FINITE[name](blocks.model.head.weight)

    trainer = make_trainer(objective=objective, ema=0.9, **settings)
    before = weights(trainer), {k: v.clone() for k, v in trainer.tensors()["ema"].items()}
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        trainer.step_block(trainer.blocks[1])
    assert equal(weights(trainer), before[0]) and equal(trainer.tensors()["ema"], before[1])
    assert trainer.step == 0


def test_from_a_gradient_on_that_is_not_finite_nothing_moves():
    groups = make_groups(3)
    first, broken, last = (next(iter(group.parameters.values())) for group in groups)
    before = tensors(groups)
    inside = OptimizerInBackward(groups, "cpu")
    for group in groups:
        group.prepare(0.1)
    zero = torch.zeros(3, requires_grad=True)
    # the backward meets the parameters of the last summand first
    loss = last.sum() + (broken * 0 + zero).sqrt().sum() * 0 + first.sum()
    assert torch.isfinite(loss)
    inside.backward(loss)
    norm = inside.finish(loss.detach(), groups)
    assert not torch.isfinite(norm)
    after = tensors(groups)
    moved = [not torch.equal(was, now) for was, now in zip(before, after, strict=True)]
    count = len(groups[0].tensors())
    assert [any(moved[i * count : (i + 1) * count]) for i in range(3)] == [True, False, False]
    # no average moves
    assert not any(moved[count - 1 :: count])


def test_in_the_backward_a_gradient_that_is_not_finite_says_that_parameters_moved():
    trainer = make_trainer(**IN_BACKWARD)

    def objective(blocks, block, batch, draw):
        zero = torch.zeros(3, requires_grad=True)
        return (
            blocks.model.head.bias.sum()
            + (blocks.model.head.weight.sum() * 0 + zero).sqrt().sum() * 0
        )

    trainer.objective = objective
    with pytest.raises(FloatingPointError, match="; parameters with earlier gradients were upd"):
        trainer.step_block(trainer.blocks[0])


def test_a_batch_that_was_cut_is_not_gone_on_with():
    after, inside = make_trainer(clip=0.0), make_trainer(**IN_BACKWARD)
    after.micro_batch.size = 2
    before = weights(inside)
    with pytest.raises(ValueError, match="of 4 are cut into micro-batches of 2, got True"):
        inside.restore(after.tensors(), after.counters())
    assert equal(weights(inside), before) and inside.micro_batch.size == 4


def test_both_return_the_norm_of_the_whole_gradient():
    for in_backward in (False, True):
        groups = make_groups()
        each = updater(in_backward, 0.0, groups, "cpu")
        for group in groups:
            group.prepare(0.1)
        a, b = (next(iter(group.parameters.values())) for group in groups)
        loss = (3 * a).sum() + (4 * b).sum()
        each.backward(loss)
        norm = each.finish(loss.detach(), groups)
        torch.testing.assert_close(norm, torch.tensor(75.0).sqrt())
        assert a.grad is None and b.grad is None


def test_a_backward_of_someone_else_updates_nothing():
    trainer = make_trainer(**IN_BACKWARD)
    trainer.step_block(trainer.blocks[0])
    before = weights(trainer)
    weight = trainer.blocks.model.head.weight
    weight.sum().backward()
    assert equal(weights(trainer), before) and torch.equal(weight.grad, torch.ones_like(weight))


def test_the_setting_names_the_updater():
    assert isinstance(updater(False, 1.0, make_groups(), "cpu"), OptimizerAfterBackward)
    assert isinstance(updater(True, 0.0, make_groups(), "cpu"), OptimizerInBackward)


def test_out_of_memory_with_the_optimizer_in_the_backward_is_not_tried_again():
    calls = []

    def objective(blocks, block, batch, draw):
        calls.append(len(batch["label"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = make_trainer(objective=objective, **IN_BACKWARD)
    with pytest.raises(torch.OutOfMemoryError, match=r"block 0 at its step 0 .* cannot be halved"):
        trainer.step_block(trainer.blocks[0])
    assert calls == [4]
