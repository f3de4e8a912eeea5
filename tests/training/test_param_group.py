import pytest
import torch
from torch import nn

from dbkernels.training.param_group import ParamGroup, tensor_sizes


def make_group(ema=0.5, **settings):
    torch.manual_seed(2)
    parameters = {"a": nn.Parameter(torch.randn(3)), "b.c": nn.Parameter(torch.randn(2, 2))}
    return ParamGroup(parameters, total=8, weight_decay=0.1, ema=ema, **settings)


def set_gradients(group, value):
    for parameter in group.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def update(group, lr, where=True):
    group.prepare(lr)
    group.update(where=torch.tensor(where))
    group.move_average(where=torch.tensor(where))
    group.steps += where


def test_update_is_adamw_at_the_given_rate_and_frees_the_gradients():
    group, plain = make_group(), make_group()
    reference = torch.optim.AdamW(plain.parameters.values(), lr=0.3, weight_decay=0.1)
    for value in (1.0, -2.0):
        set_gradients(group, value)
        set_gradients(plain, value)
        update(group, 0.3)
        reference.step()
    for name, parameter in group.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name])
        assert parameter.grad is None


def test_one_parameter_is_updated_where_it_is_the_only_one_to_look_at():
    group = make_group()
    before = {name: p.detach().clone() for name, p in group.parameters.items()}
    set_gradients(group, 1.0)
    group.prepare(0.1)
    group.update(where=torch.tensor(True), only=group.parameters["a"])
    assert (
        not torch.equal(group.parameters["a"], before["a"]) and group.parameters["a"].grad is None
    )
    assert torch.equal(group.parameters["b.c"], before["b.c"])
    assert group.parameters["b.c"].grad is not None
    group.update(where=torch.tensor(True))
    assert not torch.equal(group.parameters["b.c"], before["b.c"])


def test_average_moves_by_its_own_steps():
    group = make_group(ema=0.5)
    before = group.average["a"].clone()
    set_gradients(group, 1.0)
    update(group, 0.1)
    current = group.parameters["a"].detach()
    # the first decay is a tenth, the second two elevenths
    expected = 0.1 * before + 0.9 * current
    torch.testing.assert_close(group.average["a"], expected)
    set_gradients(group, 1.0)
    update(group, 0.1)
    expected = 2 / 11 * expected + 9 / 11 * group.parameters["a"].detach()
    torch.testing.assert_close(group.average["a"], expected)


def test_the_first_state_is_what_the_optimizer_makes_itself():
    group, lazy = make_group(), make_group()
    lazy.optimizer.state.clear()
    for _ in range(2):
        for each in (group, lazy):
            set_gradients(each, 1.0)
            update(each, 0.1)
        ours, theirs = group.optimizer_tensors(), lazy.optimizer_tensors()
        assert ours.keys() == theirs.keys() and group.optimizer.state.keys() != {}
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
        for name, parameter in group.parameters.items():
            assert torch.equal(parameter, lazy.parameters[name])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_all_tensors_are_there_from_the_start_and_stay_the_same_objects(ema):
    group = make_group(ema)
    before = [id(tensor) for tensor in group.tensors()]
    assert len(set(before)) == 2 * (5 if ema else 4)
    assert sorted(tensor_sizes(group.parameters.values(), ema)) == sorted(
        tensor.nbytes for tensor in group.tensors()
    )
    set_gradients(group, 1.0)
    update(group, 0.1)
    group.restore(1, group.average, group.optimizer_tensors())
    assert [id(tensor) for tensor in group.tensors()] == before


def test_nothing_moves_where_it_is_not_to():
    group = make_group()
    set_gradients(group, 1.0)
    update(group, 0.1)
    before = [tensor.detach().clone() for tensor in group.tensors()]
    set_gradients(group, float("nan"))
    update(group, 0.1, where=False)
    assert all(map(torch.equal, group.tensors(), before))
    assert all(parameter.grad is None for parameter in group.parameters.values())


def test_no_average_without_ema():
    group = make_group(ema=0.0)
    set_gradients(group, 1.0)
    update(group, 0.1)
    assert group.average == {}


def test_restored_group_goes_on_with_the_same_bits():
    group = make_group()
    set_gradients(group, 1.0)
    update(group, 0.1)
    assert group.steps == 1
    saved = {name: p.detach().clone() for name, p in group.parameters.items()}
    average = {name: tensor.clone() for name, tensor in group.average.items()}
    state = {name: tensor.clone() for name, tensor in group.optimizer_tensors().items()}
    other = make_group()
    with torch.no_grad():
        for name, parameter in other.parameters.items():
            parameter.copy_(saved[name])
    other.restore(1, average, state)
    for each in (group, other):
        set_gradients(each, 3.0)
        update(each, 0.2)
    assert other.steps == group.steps == 2
    for name in saved:
        assert torch.equal(other.parameters[name], group.parameters[name])
        assert torch.equal(other.average[name], group.average[name])


def test_a_rate_that_a_graph_reads_gives_the_same_bits():
    number, tensor = make_group(), make_group(captured=True)
    for each in (number, tensor):
        for lr in (0.1, 1e-4 / 3):
            set_gradients(each, 0.7)
            update(each, lr)
    for name, parameter in number.parameters.items():
        assert torch.equal(parameter, tensor.parameters[name])
    # a GPU would compute with all digits of a number
    rates = [each.optimizer.param_groups[0]["lr"] for each in (number, tensor)]
    assert rates[0] == rates[1].item() != 1e-4 / 3
    rate = tensor.optimizer.param_groups[0]["lr"]
    tensor.prepare(0.3)
    assert rate is tensor.optimizer.param_groups[0]["lr"] and rate == torch.tensor(0.3)
