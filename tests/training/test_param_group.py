"""What a step does to parameters: rate, average, optimizer after the backward and in it."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training.tiny import IN_BACKWARD, VIT, equal, make_data, make_trainer, steps, weights

from dbkernels.memory.measure import measure_peak
from dbkernels.models import ViT
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.optimizers.adamw import FusedAdamW
from dbkernels.training.optimizers.schedule import learning_rate
from dbkernels.training.param_group import ParamGroup, average_decay, tensor_sizes
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

YES = torch.tensor(True)
SHAPES = {"w0": (3,), "w1": (2, 2)}


def make_group(ema=0.5, dtype=torch.float32, **settings):
    torch.manual_seed(2)
    values = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    parameters = {name: nn.Parameter(value) for name, value in values.items()}
    config = TrainerConfig(steps=8, weight_decay=0.1, ema=ema, **settings)
    return ParamGroup(parameters, config, total=8)


def set_gradients(group, value):
    for parameter in group.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def update(group, lr, gradient):
    set_gradients(group, gradient)
    group.prepare(lr)
    group.update(where=YES)
    group.move_average(where=YES)
    group.steps += 1


def same(first, second):
    return all(map(torch.equal, first.tensors(), second.tensors()))


# rate and average


def test_constant_rate_after_a_linear_warm_up():
    rate = partial(learning_rate, total=10, lr=1.0, warmup=3, decay="constant")
    assert [rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_last_step():
    rate = partial(learning_rate, total=10, lr=2.0, warmup=2, decay="cosine")
    expected = {2: 2.0, 6: 1.0, 9: 1 + math.cos(math.pi * 7 / 8), 10: 0.0, 20: 0.0}
    assert {step: rate(step) for step in expected} == pytest.approx(expected)
    assert rate(2) == 2.0


def test_average_forgets_the_start_quickly_and_moves_by_its_own_steps():
    decays = [average_decay(step, 0.999) for step in (0, 90, 10**6)]
    assert decays == pytest.approx([0.1, 0.91, 0.999], rel=1e-9)
    group = make_group(ema=0.5)
    expected = group.average["w0"].clone()
    # the first decay is a tenth, the second two elevenths
    for decay in (0.1, 2 / 11):
        update(group, 0.1, 1.0)
        expected = decay * expected + (1 - decay) * group.parameters["w0"].detach()
        torch.testing.assert_close(group.average["w0"], expected)


# a group


def test_update_is_adamw_at_the_given_rate_and_frees_the_gradients_of_what_it_looks_at():
    group, plain = make_group(), make_group()
    reference = torch.optim.AdamW(plain.parameters.values(), lr=0.3, weight_decay=0.1)
    first, second = group.parameters.values()
    for value in (1.0, -2.0):
        set_gradients(group, value)
        group.prepare(0.3)
        group.update(where=YES, only=first)
        assert first.grad is None and second.grad is not None
        group.update(where=YES)
        set_gradients(plain, value)
        reference.step()
    for name, parameter in group.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name])
        assert parameter.grad is None


def test_the_first_state_is_what_the_optimizer_makes_itself():
    group, lazy = make_group(), make_group()
    lazy.optimizers[0].state.clear()
    for _ in range(2):
        for each in (group, lazy):
            update(each, 0.1, 1.0)
        ours, theirs = group.optimizer_tensors(), lazy.optimizer_tensors()
        assert equal(ours, theirs) and ours and same(group, lazy)
        assert all(tensor.dtype == theirs[name].dtype for name, tensor in ours.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_all_tensors_are_there_from_the_start_and_stay_the_same_objects(ema, dtype):
    group = make_group(ema, dtype)
    before = [id(tensor) for tensor in group.tensors()]
    count = (5 if ema else 4) + (dtype == torch.float16)
    assert len(set(before)) == 2 * count and bool(group.average) == bool(ema)
    sizes = [tensor.nbytes for tensor in group.tensors()]
    config = TrainerConfig(steps=8, ema=ema)
    assert sorted(tensor_sizes(group.parameters, config, FusedAdamW())) == sorted(sizes)
    update(group, 0.1, 1.0)
    group.restore(1, group.average, group.optimizer_tensors(), {})
    assert [id(tensor) for tensor in group.tensors()] == before


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_hold_the_rounded_values_of_float32_ones(dtype, in_backward):
    narrow, wide = make_group(dtype=dtype), make_group()
    for name, parameter in wide.parameters.items():
        parameter.data.copy_(narrow.parameters[name].detach())
        wide.average[name].copy_(parameter.detach())
    # less than the last bit of a parameter, by gradients whose squares float16 does not have
    for _ in range(40):
        for group in (narrow, wide):
            set_gradients(group, 2.0**-14)
            group.prepare(1e-4)
            for parameter in group.parameters.values() if in_backward else [None]:
                group.update(YES, parameter)
            group.move_average(YES)
            group.steps += 1
    for name, parameter in wide.parameters.items():
        assert torch.equal(narrow.parameters[name], parameter.to(dtype))
        assert torch.equal(narrow.average[name], wide.average[name])
    assert all(p.grad is None for p in narrow.parameters.values())
    # what is written from outside is what the next step moves
    written = narrow.parameters["w0"].data.fill_(3)
    update(narrow, 0.5, 1.0)
    torch.testing.assert_close(written.float(), torch.full((3,), 2.4), rtol=0, atol=0.2)
    set_gradients(narrow, 1.0)
    narrow.drop_gradients()
    assert all(p.grad is None for p in narrow.parameters.values())


def test_a_rate_that_a_graph_reads_gives_the_same_bits():
    number, tensor = make_group(), make_group(cuda_graphs=True)
    for each in (number, tensor):
        for lr in (0.1, 1e-4 / 3):
            update(each, lr, 0.7)
    assert same(number, tensor)
    # a GPU would compute with all digits of a number
    rates = [each.optimizers[0].param_groups[0]["lr"] for each in (number, tensor)]
    assert rates[0] == rates[1].item() != 1e-4 / 3
    tensor.prepare(0.3)
    assert rates[1] is tensor.optimizers[0].param_groups[0]["lr"] and rates[1] == torch.tensor(0.3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("capturing", [False, True])
def test_what_a_graph_captures_may_be_captured_and_else_warns_of_nothing(monkeypatch, capturing):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    stream = SimpleNamespace(is_capturing=lambda: capturing)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    update(make_group(cuda_graphs=True), 0.1, 1.0)


# the optimizer in the backward


def test_a_step_with_the_optimizer_in_the_backward_peaks_lower_by_all_but_one_layers_gradients():
    # one block, whose gradients outweigh all else
    config, peaks = replace(VIT, dim=64, depth=8, mlp_hidden=256, cond_dim=64), []
    for settings in ({"clip": 0.0}, IN_BACKWARD):
        blocks = DiffusionBlocks(ViT(config), 1)
        trainer = Trainer(blocks, make_data(), steps=2, batch_size=4, **settings)
        steps(trainer, [0])
        optimizers = [o for group in trainer.groups.values() for o in group.optimizers]
        step = partial(trainer.step_block, blocks[0])
        peaks.append(measure_peak(step, model=blocks, optimizers=optimizers))
    after, inside = peaks
    layer = sum(p.nbytes for p in blocks.model.layers[0].parameters())
    assert 6 * layer < after.total_bytes - inside.total_bytes < 8 * layer
    assert inside.by_category["gradients"] <= 1.1 * layer


def test_a_backward_of_someone_else_updates_nothing():
    trainer = make_trainer(**IN_BACKWARD)
    steps(trainer, [0])
    before, weight = weights(trainer), trainer.blocks.model.head.weight
    weight.sum().backward()
    assert equal(weights(trainer), before) and torch.equal(weight.grad, torch.ones_like(weight))
