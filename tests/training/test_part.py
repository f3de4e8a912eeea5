import pytest
import torch
from torch import nn

from dbkernels.training.part import Part, tensor_sizes


def make_part(ema=0.5, **settings):
    torch.manual_seed(2)
    parameters = {"a": nn.Parameter(torch.randn(3)), "b.c": nn.Parameter(torch.randn(2, 2))}
    return Part(parameters, total=8, weight_decay=0.1, ema=ema, **settings)


def set_gradients(part, value):
    for parameter in part.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def update(part, lr, where=True):
    part.prepare(lr)
    part.update(where=torch.tensor(where))
    part.move_average(where=torch.tensor(where))
    part.steps += where


def test_update_is_adamw_at_the_given_rate_and_frees_the_gradients():
    part, plain = make_part(), make_part()
    reference = torch.optim.AdamW(plain.parameters.values(), lr=0.3, weight_decay=0.1)
    for value in (1.0, -2.0):
        set_gradients(part, value)
        set_gradients(plain, value)
        update(part, 0.3)
        reference.step()
    for name, parameter in part.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name])
        assert parameter.grad is None


def test_one_parameter_is_updated_where_it_is_the_only_one_to_look_at():
    part = make_part()
    before = {name: p.detach().clone() for name, p in part.parameters.items()}
    set_gradients(part, 1.0)
    part.prepare(0.1)
    part.update(where=torch.tensor(True), only=part.parameters["a"])
    assert not torch.equal(part.parameters["a"], before["a"]) and part.parameters["a"].grad is None
    assert torch.equal(part.parameters["b.c"], before["b.c"])
    assert part.parameters["b.c"].grad is not None
    part.update(where=torch.tensor(True))
    assert not torch.equal(part.parameters["b.c"], before["b.c"])


def test_average_moves_by_its_own_steps():
    part = make_part(ema=0.5)
    before = part.average["a"].clone()
    set_gradients(part, 1.0)
    update(part, 0.1)
    current = part.parameters["a"].detach()
    # the first decay is a tenth, the second two elevenths
    expected = 0.1 * before + 0.9 * current
    torch.testing.assert_close(part.average["a"], expected)
    set_gradients(part, 1.0)
    update(part, 0.1)
    expected = 2 / 11 * expected + 9 / 11 * part.parameters["a"].detach()
    torch.testing.assert_close(part.average["a"], expected)


def test_the_first_state_is_what_the_optimizer_makes_itself():
    part, lazy = make_part(), make_part()
    lazy.optimizer.state.clear()
    for _ in range(2):
        for each in (part, lazy):
            set_gradients(each, 1.0)
            update(each, 0.1)
        ours, theirs = part.optimizer_tensors(), lazy.optimizer_tensors()
        assert ours.keys() == theirs.keys() and part.optimizer.state.keys() != {}
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
        for name, parameter in part.parameters.items():
            assert torch.equal(parameter, lazy.parameters[name])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_all_tensors_are_there_from_the_start_and_stay_the_same_objects(ema):
    part = make_part(ema)
    before = [id(tensor) for tensor in part.tensors()]
    assert len(set(before)) == 2 * (5 if ema else 4)
    assert sorted(tensor_sizes(part.parameters.values(), ema)) == sorted(
        tensor.nbytes for tensor in part.tensors()
    )
    set_gradients(part, 1.0)
    update(part, 0.1)
    part.restore(1, part.average, part.optimizer_tensors())
    assert [id(tensor) for tensor in part.tensors()] == before


def test_nothing_moves_where_it_is_not_to():
    part = make_part()
    set_gradients(part, 1.0)
    update(part, 0.1)
    before = [tensor.detach().clone() for tensor in part.tensors()]
    set_gradients(part, float("nan"))
    update(part, 0.1, where=False)
    assert all(map(torch.equal, part.tensors(), before))
    assert all(parameter.grad is None for parameter in part.parameters.values())


def test_no_average_without_ema():
    part = make_part(ema=0.0)
    set_gradients(part, 1.0)
    update(part, 0.1)
    assert part.average == {}


def test_restored_part_goes_on_with_the_same_bits():
    part = make_part()
    set_gradients(part, 1.0)
    update(part, 0.1)
    assert part.steps == 1
    saved = {name: p.detach().clone() for name, p in part.parameters.items()}
    average = {name: tensor.clone() for name, tensor in part.average.items()}
    state = {name: tensor.clone() for name, tensor in part.optimizer_tensors().items()}
    other = make_part()
    with torch.no_grad():
        for name, parameter in other.parameters.items():
            parameter.copy_(saved[name])
    other.restore(1, average, state)
    for each in (part, other):
        set_gradients(each, 3.0)
        update(each, 0.2)
    assert other.steps == part.steps == 2
    for name in saved:
        assert torch.equal(other.parameters[name], part.parameters[name])
        assert torch.equal(other.average[name], part.average[name])


def test_a_rate_that_a_graph_reads_gives_the_same_bits():
    number, tensor = make_part(), make_part(captured=True)
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
