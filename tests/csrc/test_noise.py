"""The tiles of noise.h and of the ops that are loops over them, against one element at a time."""

import pytest
import torch
from threads import with_threads

from dbkernels.ops import _maths, add_noise, score_loss
from dbkernels.ops.backend.noise_tile import NOISE
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, normals, uniforms

DRAW = Draw(seed=2**64 - 9, step=2**40 + 3, sample=2**32 - 40)
# about a group, a vector of groups, what a tile is filled to, and a tile
SIZES = [*range(1, 10), 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 1029, 1060, 2048, 2051]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def compiled():
    with use_implementation("cpp"):
        yield


def normals_one_by_one(draw, b, elements):
    seed, step, sample = draw.arguments(1)
    words = _maths.draw_words(seed, step.item(), sample, NOISE)
    numbers = []
    for group in range(-(-elements // 4)):
        c1, c2, c3, *key = words
        x = _maths.philox(group, c1 + b, c2, c3, *key)
        numbers += [*_maths.pair_of_normals(*x[:2]), *_maths.pair_of_normals(*x[2:])]
    return numbers[:elements]


@pytest.mark.parametrize("elements", SIZES)
def test_normals_of_any_size_are_those_of_the_elements(elements):
    B = 1 if elements > 1029 else 3
    expected = [normals_one_by_one(DRAW, b, elements) for b in range(B)]
    assert normals(DRAW, B, elements).tolist() == expected


@pytest.mark.parametrize("elements", [1, 2, 33])
def test_many_small_samples(elements):
    actual = normals(Draw(5, 6, 7), 1500, elements)
    for b in (0, 1, 511, 1024, 1499):
        assert actual[b].tolist() == normals_one_by_one(Draw(5, 6, 7), b, elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 7, 33, 1061])
def test_nothing_past_a_sample_is_written(dtype, elements):
    """Rows of a larger buffer, as a caller of the raw ops may pass them."""
    z0, one = torch.ones(2, elements, dtype=dtype), torch.ones(2)
    buffers = [torch.full((2 * elements + 64,), 9.0, dtype=dtype) for _ in range(3)]
    z, dprediction, dz0 = (t[32:-32].view(2, elements) for t in buffers)
    words = DRAW.arguments(2)
    torch.ops.dbkernels.add_noise_fwd(z0, one, one, z, *words)
    torch.ops.dbkernels.score_loss_fwd(
        z0, z0, one, one, None, None, dprediction, dz0, torch.empty(2), *words, 1.0
    )
    for t in buffers:
        assert (t[:32] == 9).all() and (t[-32:] == 9).all() and (t[32:-32] != 9).all()


def results(prediction, z0, a, b, mask):
    z = add_noise(z0, a, b, DRAW)
    leaves = [t.detach().requires_grad_() for t in (prediction, z0)]
    loss, losses = score_loss(*leaves, a, b, DRAW, weight=b.square(), mask=mask)
    return [z, losses, *torch.autograd.grad(loss, leaves)]


# each is worth several threads; 5001 begins rows, and so vectors, at odd addresses
@pytest.mark.parametrize("shape", [(20000, 3), (13, 5001), (1, 70000)], ids=str)
@pytest.mark.parametrize("dims", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(shape, dims):
    prediction, z0, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3
    draw, (a, b) = Draw(1, 2, 3), torch.rand(2, *shape[:dims])
    for f in (
        lambda: results(*(t[:40] for t in (prediction, z0, a, b, mask))),
        lambda: [normals(draw, *shape), uniforms(draw, *shape), uniforms(draw, 40000)],
    ):
        one, two, five = (with_threads(count, f) for count in (1, 2, 5))
        assert all(map(torch.equal, one, two)) and all(map(torch.equal, one, five))


# one weight, and as many as elements
@pytest.mark.parametrize("per", [1, 200_000])
def test_the_loss_of_many_tiles_is_as_exact_as_float32(per):
    prediction, z0 = 3 + torch.randn(2, 200_000), torch.zeros(2, 200_000)
    one = torch.ones(2, per).squeeze(1)
    _, losses = score_loss(prediction, z0, one, 0.4 * one, DRAW, weight=one)
    noise = normals(DRAW, 2, 200_000).double()
    exact = (prediction.double() - 0.4 * noise).square().mean(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-7, atol=0)
