"""A draw whose step is a tensor, in every op that takes a draw."""

import pytest
import torch
from implementations import implementations
from ops.score_case import inputs, results
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import add_noise, score_loss
from dbkernels.ops.add_noise import _forward_torch as noise_in_torch
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, _forward_op, _uniform_op, normals, uniforms
from dbkernels.ops.philox import _forward_torch as normals_in_torch
from dbkernels.ops.philox import _uniform_torch as uniforms_in_torch
from dbkernels.ops.score_loss import _forward_torch as loss_in_torch

SHAPE = (3, 1027)  # two tiles
OPS = {
    "normals": lambda draw, *tensors: [normals(draw, *SHAPE)],
    "uniforms": lambda draw, *tensors: [uniforms(draw, 3)],
    "add_noise": lambda draw, _, z0, sigma: [add_noise(z0, sigma, draw, scale="c_in")],
    "score_loss": lambda draw, *tensors: results(score_loss, *tensors, draw, sigma_data=0.5),
}
every = pytest.mark.parametrize("f", OPS.values(), ids=OPS)


def loss_alone(draw, *tensors):
    return score_loss(*tensors, draw, sigma_data=0.5)


@pytest.fixture(params=implementations("score_loss_fwd"))
def implementation(request):
    with use_implementation(request.param):
        yield request.param


@every
@pytest.mark.parametrize("step", [2**32 - 1, 2**32 + 9, 2**56 - 1])
def test_draws_the_bits_of_the_integer(implementation, f, step):
    given, tensors = torch.tensor(step), inputs(SHAPE)
    for sample in (3, 2**32 - 3):
        number, memory = (Draw(2**64 - 9, each, sample) for each in (step, given))
        assert all(map(torch.equal, f(memory, *tensors), f(number, *tensors)))
    assert given.item() == step


@every
def test_is_read_at_each_call(implementation, f):
    step, tensors = torch.tensor(0), inputs(SHAPE)
    draw, seen = Draw(7, step, 8), []
    for value in (5, 6, 2**40 + 5, 5):
        step.fill_(value)
        seen.append(f(draw, *tensors))
        assert all(map(torch.equal, seen[-1], f(Draw(7, value, 8), *tensors)))
    assert not any(map(torch.equal, seen[0], seen[1]))
    assert not any(map(torch.equal, seen[0], seen[2]))


def test_is_read_when_the_raw_op_runs(implementation):
    step, numbers, levels = torch.tensor(0), torch.empty(2, 9), torch.empty(2).double()
    for value in (5, 6, 2**40):
        step.fill_(value)
        _forward_op(numbers, 7, step, 8)
        _uniform_op(levels, 7, step, 8)
        assert torch.equal(numbers, normals(Draw(7, value, 8), 2, 9))
        assert torch.equal(levels, uniforms(Draw(7, value, 8), 2))


@every
def test_may_lie_anywhere_in_a_buffer(implementation, f):
    steps, tensors = torch.arange(40, 43), inputs(SHAPE)
    assert all(map(torch.equal, f(Draw(7, steps[1]), *tensors), f(Draw(7, 41), *tensors)))


@pytest.mark.parametrize("f", [*list(OPS.values())[:3], loss_alone], ids=OPS)
def test_is_an_input_of_one_compiled_graph(implementation, f):
    step, tensors, graphs = torch.tensor(0), inputs(SHAPE), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda draw: f(draw, *tensors)[0], backend=backend, fullgraph=True)
    for value in (5, 6, 2**40):
        step.fill_(value)
        (expected, *_) = f(Draw(3, value), *tensors)
        for given in (step, torch.tensor(value)):
            assert torch.equal(compiled(Draw(3, given)), expected)
    assert len(graphs) == 1


@every
def test_runs_on_fake_tensors(f):
    shapes = [t.shape for t in f(Draw(5, 6), *inputs(SHAPE))]
    with FakeTensorMode():
        for step in (6, torch.zeros((), dtype=torch.int64)):
            assert [t.shape for t in f(Draw(5, step), *inputs(SHAPE))] == shapes


def test_no_launcher_of_plain_torch_waits_for_its_value():
    with torch.device("meta"):  # where to look at a value raises
        step = torch.empty((), dtype=torch.int64)
        draw = Draw(7, step, 8).arguments(*SHAPE, "meta")
        z0, level = torch.empty(SHAPE), torch.empty(3)
        normals_in_torch(z0, *draw)
        uniforms_in_torch(torch.empty(3, dtype=torch.float64), *draw)
        noise_in_torch(z0, level, z0, *draw, True, 0.5)
        loss_in_torch(z0, z0, level, None, None, z0, z0, level, *draw, 0.5, 1.0)
    assert draw[1] is step


@every
def test_on_another_device_is_an_error(f):
    step = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"step must be on (cpu|cuda:0), got meta"):
        f(Draw(0, step), *inputs(SHAPE))


def test_the_device_may_be_given_by_name():
    draw = Draw(0, torch.tensor(0))
    name = draw.step.device.type
    assert torch.equal(normals(draw, 2, 3, name), normals(draw, 2, 3, draw.step.device))
    with pytest.raises(ValueError, match="step must be on meta, got"):
        uniforms(draw, 2, "meta")
