"""What a step does to parameters: rate, average, optimizer after the backward and in it."""

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import nn
from training.tiny import equal, make_trainer, weights

from dbkernels.memory.measure import measure_peak
from dbkernels.models import ViT, ViTConfig
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.param_group import (
    OptimizerAfterBackward,
    OptimizerInBackward,
    ParamGroup,
    average_decay,
    learning_rate,
    tensor_sizes,
    updater,
)
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

IN_BACKWARD = {"optimizer_in_backward": True, "clip": 0.0}
UPDATES = [TrainerConfig(1, clip=0.0, optimizer_in_backward=each) for each in (False, True)]


def make_group(ema=0.5, shapes=((3,), (2, 2)), **settings):
    torch.manual_seed(2)
    parameters = {f"w{i}": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    config = TrainerConfig(steps=8, weight_decay=0.1, ema=ema, **settings)
    return ParamGroup(parameters, config, total=8)


def make_groups(count=2):
    return [make_group(shapes=[(3,)]) for _ in range(count)]


def set_gradients(group, value):
    for parameter in group.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def update(group, lr, gradient, where=True):
    set_gradients(group, gradient)
    group.prepare(lr)
    group.update(where=torch.tensor(where))
    group.move_average(where=torch.tensor(where))
    group.steps += where


def copies(*groups):
    return [tensor.detach().clone() for group in groups for tensor in group.tensors()]


def same(first, second):
    return all(map(torch.equal, first.tensors(), second.tensors()))


def first_of(groups):
    return [next(iter(group.parameters.values())) for group in groups]


# rate and average


def test_constant_rate_after_a_linear_warm_up():
    rate = partial(learning_rate, total=10, lr=1.0, warmup=3, decay="constant")
    assert [rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_last_step():
    rate = partial(learning_rate, total=10, lr=2.0, warmup=2, decay="cosine")
    expected = {2: 2.0, 6: 1.0, 9: 1 + math.cos(math.pi * 7 / 8), 10: 0.0, 20: 0.0}
    assert {step: rate(step) for step in expected} == pytest.approx(expected)
    assert rate(2) == 2.0


def test_average_forgets_the_start_quickly_and_reaches_its_decay():
    assert average_decay(0, 0.999) == 0.1
    assert average_decay(90, 0.999) == pytest.approx(0.91)
    assert average_decay(10**6, 0.999) == 0.999


def test_average_moves_by_its_own_steps():
    group = make_group(ema=0.5)
    expected = group.average["w0"].clone()
    # the first decay is a tenth, the second two elevenths
    for decay in (0.1, 2 / 11):
        update(group, 0.1, 1.0)
        expected = decay * expected + (1 - decay) * group.parameters["w0"].detach()
        torch.testing.assert_close(group.average["w0"], expected)


# a group


def test_update_is_adamw_at_the_given_rate_and_frees_the_gradients():
    group, plain = make_group(), make_group()
    reference = torch.optim.AdamW(plain.parameters.values(), lr=0.3, weight_decay=0.1)
    for value in (1.0, -2.0):
        update(group, 0.3, value)
        set_gradients(plain, value)
        reference.step()
    for name, parameter in group.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name])
        assert parameter.grad is None


def test_one_parameter_is_updated_where_it_is_the_only_one_to_look_at():
    group = make_group()
    first, second = group.parameters.values()
    before = copies(group)
    set_gradients(group, 1.0)
    group.prepare(0.1)
    group.update(where=torch.tensor(True), only=first)
    assert not torch.equal(first, before[0]) and first.grad is None
    assert torch.equal(second, before[1]) and second.grad is not None
    group.update(where=torch.tensor(True))
    assert not torch.equal(second, before[1])


def test_the_first_state_is_what_the_optimizer_makes_itself():
    group, lazy = make_group(), make_group()
    lazy.optimizer.state.clear()
    for _ in range(2):
        for each in (group, lazy):
            update(each, 0.1, 1.0)
        ours, theirs = group.optimizer_tensors(), lazy.optimizer_tensors()
        assert equal(ours, theirs) and ours
        assert all(tensor.dtype == theirs[name].dtype for name, tensor in ours.items())
        assert same(group, lazy)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_all_tensors_are_there_from_the_start_and_stay_the_same_objects(ema):
    group = make_group(ema)
    before = [id(tensor) for tensor in group.tensors()]
    assert len(set(before)) == 2 * (5 if ema else 4) and bool(group.average) == bool(ema)
    sizes = [tensor.nbytes for tensor in group.tensors()]
    assert sorted(tensor_sizes(group.parameters.values(), ema)) == sorted(sizes)
    update(group, 0.1, 1.0)
    group.restore(1, group.average, group.optimizer_tensors())
    assert [id(tensor) for tensor in group.tensors()] == before


def test_nothing_moves_where_it_is_not_to():
    group = make_group()
    update(group, 0.1, 1.0)
    before = copies(group)
    update(group, 0.1, float("nan"), where=False)
    assert all(map(torch.equal, group.tensors(), before))
    assert all(parameter.grad is None for parameter in group.parameters.values())


def test_a_restored_group_goes_on_with_the_same_bits():
    group, other = make_group(), make_group()
    update(group, 0.1, 1.0)
    average = {name: tensor.clone() for name, tensor in group.average.items()}
    state = {name: tensor.clone() for name, tensor in group.optimizer_tensors().items()}
    with torch.no_grad():
        for name, parameter in other.parameters.items():
            parameter.copy_(group.parameters[name])
    other.restore(1, average, state)
    for each in (group, other):
        update(each, 0.2, 3.0)
    assert other.steps == group.steps == 2 and same(other, group)


def test_a_rate_that_a_graph_reads_gives_the_same_bits():
    number, tensor = make_group(), make_group(cuda_graphs=True)
    for each in (number, tensor):
        for lr in (0.1, 1e-4 / 3):
            update(each, lr, 0.7)
    assert same(number, tensor)
    # a GPU would compute with all digits of a number
    rates = [each.optimizer.param_groups[0]["lr"] for each in (number, tensor)]
    assert rates[0] == rates[1].item() != 1e-4 / 3
    tensor.prepare(0.3)
    assert rates[1] is tensor.optimizer.param_groups[0]["lr"] and rates[1] == torch.tensor(0.3)


# updates after the backward and in it


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


@pytest.mark.parametrize("in_backward", [False, True])
def test_updates_return_the_norm_of_the_whole_gradient_and_leave_none(in_backward):
    groups = make_groups()
    each = updater(UPDATES[in_backward], groups, "cpu")
    assert isinstance(each, OptimizerInBackward if in_backward else OptimizerAfterBackward)
    for group in groups:
        group.prepare(0.1)
    a, b = first_of(groups)
    loss = (3 * a).sum() + (4 * b).sum()
    each.backward(loss)
    norm = each.finish(loss.detach(), groups)
    torch.testing.assert_close(norm, torch.tensor(75.0).sqrt())
    assert a.grad is None and b.grad is None


def test_a_backward_of_someone_else_updates_nothing():
    trainer = make_trainer(**IN_BACKWARD)
    trainer.step_block(trainer.blocks[0])
    before, weight = weights(trainer), trainer.blocks.model.head.weight
    weight.sum().backward()
    assert equal(weights(trainer), before) and torch.equal(weight.grad, torch.ones_like(weight))


# numbers that are not finite: of a finite loss whose gradient is not, and of a loss that is not
NOT_FINITE = {
    "gradient": lambda w: (w * 0).sqrt().sum() * 0,
    "infinite gradient": lambda w: (w * 0).sum().sqrt(),
    "loss": lambda w: w.sum() + torch.inf,
    "loss that is NaN": lambda w: w.sum() + torch.nan,
    "loss and gradient": lambda w: w.sum() * torch.nan,
}
SETTINGS = [{}, {"clip": 0.0}, {"accumulate": 2}, IN_BACKWARD]


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_after_the_backward_nothing_is_updated_where_loss_or_gradient_is_not_finite(name, clip):
    groups = make_groups()
    before, after = copies(*groups), OptimizerAfterBackward(clip, "cpu")
    for group in groups:
        group.prepare(0.1)
    ours = first_of(groups)
    loss = ours[0].sum() + NOT_FINITE[name](ours[1])
    after.backward(loss)
    norm = after.finish(loss.detach(), groups)
    assert torch.isfinite(loss) == ("loss" not in name)
    assert not torch.isfinite(loss + norm)
    assert all(map(torch.equal, copies(*groups), before))
    assert all(weight.grad is None for weight in ours)


@pytest.mark.parametrize(
    "settings, name",
    # in the backward, a finite loss lets parameters move
    [(s, name) for s in SETTINGS for name in NOT_FINITE if s != IN_BACKWARD or "loss" in name],
)
def test_a_step_that_is_not_finite_is_refused_and_moves_nothing(settings, name):
    def objective(blocks, block, batch, draw):
        return NOT_FINITE[name](blocks.model.head.weight)

    trainer = make_trainer(objective=objective, ema=0.9, **settings)
    before = weights(trainer), {k: v.clone() for k, v in trainer.tensors()["ema"].items()}
    with pytest.raises(FloatingPointError, match=r"the loss must be finite.*nothing was updated"):
        trainer.step_block(trainer.blocks[1])
    assert equal(weights(trainer), before[0]) and equal(trainer.tensors()["ema"], before[1])
    assert trainer.step == 0


@pytest.mark.parametrize("in_backward", [False, True])
def test_updates_that_follow_one_that_was_not_finite_move_nothing_until_they_are_to(in_backward):
    groups = make_groups(1)
    each, before = updater(UPDATES[in_backward], groups, "cpu"), copies(*groups)
    (weight,) = first_of(groups)

    def update(factor):
        groups[0].prepare(0.1)
        loss = weight.sum() * factor
        each.backward(loss)
        return each.finish(loss.detach(), groups)

    update(torch.nan)
    for _ in range(2):
        assert torch.isnan(update(1.0))
        assert all(map(torch.equal, copies(*groups), before))
    each.go_on()
    assert torch.isfinite(update(1.0))
    assert not any(map(torch.equal, copies(*groups), before))


def test_in_the_backward_nothing_moves_from_a_gradient_on_that_is_not_finite():
    groups = make_groups(3)
    first, broken, last = first_of(groups)
    before, inside = copies(*groups), OptimizerInBackward(groups, "cpu")
    for group in groups:
        group.prepare(0.1)
    zero = torch.zeros(3, requires_grad=True)
    # the backward meets the parameters of the last summand first
    loss = last.sum() + (broken * 0 + zero).sqrt().sum() * 0 + first.sum()
    assert torch.isfinite(loss)
    inside.backward(loss)
    assert not torch.isfinite(inside.finish(loss.detach(), groups))
    moved = [not torch.equal(*pair) for pair in zip(before, copies(*groups), strict=True)]
    count = len(groups[0].tensors())
    assert [any(moved[i * count : (i + 1) * count]) for i in range(3)] == [True, False, False]
    # no average moves
    assert not any(moved[count - 1 :: count])


def test_in_the_backward_a_gradient_that_is_not_finite_says_that_parameters_moved():
    def objective(blocks, block, batch, draw):
        zero = torch.zeros(3, requires_grad=True)
        head = blocks.model.head
        return head.bias.sum() + (head.weight.sum() * 0 + zero).sqrt().sum() * 0

    trainer = make_trainer(objective=objective, **IN_BACKWARD)
    with pytest.raises(FloatingPointError, match="; parameters with earlier gradients were upd"):
        trainer.step_block(trainer.blocks[0])


# in the backward a batch cannot be cut


def test_a_batch_that_was_cut_is_not_gone_on_with():
    after, inside = make_trainer(clip=0.0), make_trainer(**IN_BACKWARD)
    after.micro_batch.size = 2
    before = weights(inside)
    with pytest.raises(ValueError, match="of 4 are cut into micro-batches of 2, got True"):
        inside.restore(after.tensors(), after.counters())
    assert equal(weights(inside), before) and inside.micro_batch.size == 4


def test_out_of_memory_with_the_optimizer_in_the_backward_is_not_tried_again():
    calls = []

    def objective(blocks, block, batch, draw):
        calls.append(len(batch["label"]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = make_trainer(objective=objective, **IN_BACKWARD)
    with pytest.raises(torch.OutOfMemoryError, match=r"block 0 at its step 0 .* cannot be halved"):
        trainer.step_block(trainer.blocks[0])
    assert calls == [4]
