"""What holds for every op that takes a draw: whose numbers it has, and when its step is read."""

from functools import partial
from itertools import product

import pytest
import torch
from implementations import each_implementation, thinned
from ops.noise_inputs import DTYPES, OPS, Tensors, tensors
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls

from dbkernels.ops import add_noise, philox, score_loss
from dbkernels.ops.add_noise import _forward_torch as noise_in_torch
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.ops.score_loss import _forward_torch as loss_in_torch

SHAPE = (3, 33)
every = pytest.mark.parametrize("f", OPS.values(), ids=OPS)


implementation = each_implementation("score_loss_fwd")
# of what no implementation has for itself
BY_ONE = pytest.mark.parametrize("implementation", ["torch"], indirect=True)


@pytest.fixture
def t():
    return tensors(SHAPE)


def assert_same_bits(actual, expected):
    assert all(map(torch.equal, actual, expected))


def loss_alone(draw, t):
    return score_loss(*t, draw)


@pytest.mark.parametrize("f", [*OPS.values(), loss_alone], ids=[*OPS, "score_loss alone"])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_is_made_of_well_formed_torch_ops(implementation, f, per):
    opcheck_calls(partial(f, Draw(1, 2), tensors((3, 9), per)))


@pytest.mark.parametrize("shape", [(3, 33), (2, 2**16 + 5)])
def test_float64_has_the_bits_of_the_normals_that_anybody_may_look_at(shape):
    draw, (B, elements) = Draw(5, 6, 7), shape
    noise, none, one = normals(draw, B, elements).double(), torch.zeros(B), torch.ones(B)
    assert torch.equal(add_noise(torch.zeros(shape, dtype=torch.float64), none, one, draw), noise)
    _, losses = score_loss(noise, torch.zeros_like(noise), none, one, draw)
    assert torch.equal(losses, none.double())


@every
@thinned("score_loss_fwd", "dtype elements", [*product(DTYPES, (1, 7, 33, 1061))])
def test_touches_nothing_beside_its_tensors(implementation, f, dtype, elements):
    t = tensors((2, elements), dtype=dtype)
    assert_calls_stay_within_their_tensors(partial(f, Draw(1, 2), t))


@every
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize(("tile", "chunk"), [(128, 256), (256, 700)])  # a part of a row, and two
def test_launch_shape_changes_no_bit_of_an_element(
    implementation, f, per, tile, chunk, monkeypatch
):
    t = tensors((3, 3, 100), per)
    expected = f(Draw(1, 2), t)
    monkeypatch.setattr(philox, "MAX_TILE", tile)
    monkeypatch.setattr(philox, "CHUNK", chunk)
    for now, before in zip(f(Draw(1, 2), t), expected, strict=True):
        if now.dim() == 1 or not now.dim():  # a loss is a sum over elements
            torch.testing.assert_close(now, before, rtol=1e-6, atol=0)
        else:
            assert torch.equal(now, before)


@every
@pytest.mark.parametrize("per", ["sample", "token"])
def test_a_micro_batch_is_its_rows_of_the_batch(implementation, f, per):
    t = tensors((5, 7, 10), per)
    whole = f(Draw(3, 4, 0), t)
    part = f(Draw(3, 4, 3), Tensors(*(each[3:] for each in t)))
    for a, b in zip(part, whole, strict=True):
        assert not b.dim() or torch.equal(a, b[3:])


@every
def test_a_step_in_memory_is_read_at_each_call_and_draws_the_bits_of_the_integer(
    implementation, f, t
):
    step, seen = torch.tensor(0), []
    values = (5, 6, 2**32 + 9, 2**32 - 1, 2**56 - 1, 2**40 + 5, 5)
    for value in values[:: 2 if implementation == "triton" else 1]:
        step.fill_(value)
        for sample in (3, 2**32 - 3):
            drawn = f(Draw(2**64 - 9, step, sample), t)
            assert_same_bits(drawn, f(Draw(2**64 - 9, value, sample), t))
            seen.append(drawn[0])
        assert step.item() == value
    # dz0 of add_noise depends on no noise
    assert not any(torch.equal(seen[0], other) for other in seen[2:-2])


@every
def test_a_step_may_lie_anywhere_in_a_buffer(implementation, f, t):
    steps = torch.arange(40, 43)
    assert_same_bits(f(Draw(7, steps[1]), t), f(Draw(7, 41), t))


class Graphs(list):
    """A compiler's backend that keeps what it is given."""

    def compile(self, f):
        torch.compiler.reset()
        return torch.compile(f, backend=self._add, fullgraph=True)

    def _add(self, graph, inputs):
        self.append(graph)
        return graph.forward


@pytest.mark.parametrize(
    "f", [*list(OPS.values())[:3], loss_alone], ids=[*list(OPS)[:3], "score_loss alone"]
)
@BY_ONE
def test_a_step_in_memory_is_an_input_of_one_compiled_graph(implementation, f, t):
    step, graphs = torch.tensor(0), Graphs()
    compiled = graphs.compile(lambda draw: f(draw, t)[0])
    for value in (5, 6, 2**40):
        step.fill_(value)
        (expected, *_) = f(Draw(3, value), t)
        for given in (step, torch.tensor(value)):
            assert torch.equal(compiled(Draw(3, given)), expected)
    assert len(graphs) == 1


@BY_ONE
def test_a_step_does_not_compile_anew(implementation):
    graphs = Graphs()
    compiled = graphs.compile(lambda draw: normals(draw, 2, 9))
    for step in (5, 6, 7, 2**40, 2**56 - 1):
        draw = Draw(2**64 - 5, step, sample=2 * step % 2**31)
        assert torch.equal(compiled(draw), normals(draw, 2, 9))
    assert len(graphs) <= 3


@pytest.mark.parametrize("per", ["sample", "token"])
def test_no_launcher_of_plain_torch_waits_for_a_value(per):
    with torch.device("meta"):  # where to look at a value raises
        step = torch.empty((), dtype=torch.int64)
        draw = Draw(7, step, 8).arguments(*SHAPE, "meta")
        (prediction, z0, a, b), level = tensors(SHAPE, per), torch.empty(3)
        philox._forward_torch(z0, *draw)
        philox._uniform_torch(torch.empty(3, 5, dtype=torch.float64), *draw)
        noise_in_torch(z0, a, b, z0, *draw)
        loss_in_torch(prediction, z0, a, b, None, z0 > 0, z0, z0, level, *draw, 1.0)
    assert draw[1] is step


@every
def test_a_step_on_another_device_is_an_error(f, t):
    step = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"step must be on (cpu|cuda:0), got meta"):
        f(Draw(0, step), t)


def test_the_device_may_be_given_by_name():
    draw = Draw(0, torch.tensor(0))
    name = draw.step.device.type
    assert torch.equal(normals(draw, 2, 3, name), normals(draw, 2, 3, draw.step.device))
    with pytest.raises(ValueError, match="step must be on meta, got"):
        uniforms(draw, 2, device="meta")
