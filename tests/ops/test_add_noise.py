import math

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import _noise, reference
from dbkernels.ops.add_noise import (
    _forward_op,
    _forward_triton,
    _Options,
    add_noise,
    add_noise_backward,
)
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw, normals

DRAW = Draw(seed=2**64 - 9, step=2**40 + 3, sample=5)
# (3,) has one element to a sample; 7 and 231 are odd; 1040 has a second tile of 16 elements
SHAPES = [(3,), (3, 7), (2, 3, 7, 11), (3, 1040)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGMA = (0.05, 7.0, 80.0)  # noise that is far less and far more than sigma_data


@pytest.fixture(params=implementations("add_noise_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def inputs(shape, dtype=torch.float32, offset=0.0):
    return (offset + torch.randn(shape)).to(dtype), torch.tensor(SIGMA[: shape[0]])


def noise_like(z0, draw=DRAW):
    B, elements = _noise.sizes(z0)
    return normals(draw, B, elements).view(z0.shape)


@pytest.mark.parametrize("scale", [None, "c_in"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, scale):
    z0, sigma = inputs(shape, dtype, offset=30.0)
    noise, options = noise_like(z0), {"scale": scale, "sigma_data": 0.3}
    actual = with_grads(lambda z0: add_noise(z0, sigma, DRAW, **options), z0)
    eager = with_grads(lambda z0: reference.add_noise(z0, sigma, noise, **options).to(dtype), z0)
    exact = with_grads(
        lambda z0: reference.add_noise(z0, sigma.double(), noise.double(), **options), z0.double()
    )
    assert actual[0].dtype == dtype and actual[0].shape == shape
    for name, *results in zip(["z", "dz0"], actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


@pytest.mark.parametrize("z0_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_the_result_is_chosen(dtype, z0_dtype):
    z0, sigma = inputs((3, 9), z0_dtype)
    exact = reference.add_noise(z0.double(), sigma.double(), noise_like(z0).double(), scale="c_in")
    z = add_noise(z0, sigma, DRAW, scale="c_in", dtype=dtype)
    assert z.dtype == dtype
    assert_as_accurate_as_eager("z", z, exact.to(dtype), exact)
    (dz0,) = torch.autograd.grad(add_noise(z0.requires_grad_(), sigma, DRAW, dtype=dtype).sum(), z0)
    assert dz0.dtype == z0_dtype and torch.equal(dz0, torch.ones_like(z0))


def test_a_sample_has_the_noise_of_its_own_level():
    sigma = torch.tensor([0.5, 1.0, 2.0])
    z = add_noise(torch.zeros(3, 50), sigma, DRAW)
    torch.testing.assert_close(z, sigma[:, None] * normals(DRAW, 3, 50), rtol=1e-6, atol=0)


def test_same_bits_every_run():
    z0, sigma = inputs((3, 300))
    assert torch.equal(add_noise(z0, sigma, DRAW), add_noise(z0, sigma, DRAW))


def test_launch_shape_changes_no_bit(monkeypatch):
    z0, sigma = inputs((3, 700))
    expected = add_noise(z0, sigma, DRAW, scale="c_in")
    monkeypatch.setattr(_noise, "MAX_TILE", 128)
    monkeypatch.setattr(_noise, "CHUNK", 256)
    assert torch.equal(add_noise(z0, sigma, DRAW, scale="c_in"), expected)


def test_a_micro_batch_is_its_rows_of_the_batch():
    z0, sigma = inputs((3, 7, 10))
    whole = add_noise(z0, sigma, Draw(1, 2, 0), scale="c_in")
    part = add_noise(z0[2:], sigma[2:], Draw(1, 2, 2), scale="c_in")
    assert torch.equal(part, whole[2:])


def test_strides_change_no_bit():
    z0, sigma = inputs((3, 8, 10))
    strided = z0.transpose(1, 2).contiguous().transpose(1, 2)
    spread = sigma.repeat_interleave(2)[::2]
    assert torch.equal(add_noise(strided, spread, DRAW), add_noise(z0, sigma, DRAW))


def test_the_incoming_gradient_may_have_any_strides():
    z0, sigma = inputs((3, 8, 10))
    z = add_noise(z0.requires_grad_(), sigma, DRAW, scale="c_in")
    for dz in (torch.ones(()).expand(3, 8, 10), torch.randn(3, 10, 8).transpose(1, 2)):
        (actual,) = torch.autograd.grad(z, z0, dz, retain_graph=True)
        (expected,) = torch.autograd.grad(z, z0, dz.contiguous(), retain_graph=True)
        assert torch.equal(actual, expected)


def test_changes_none_of_its_arguments():
    z0, sigma = inputs((3, 9))
    before = z0.clone(), sigma.clone()
    with_grads(lambda z0: add_noise(z0, sigma, DRAW, scale="c_in"), z0)
    assert torch.equal(z0, before[0]) and torch.equal(sigma, before[1])


def test_keeps_a_level_a_sample():
    z0, sigma = inputs((3, 9))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda kept: kept):
        add_noise(z0.requires_grad_(), sigma, DRAW, scale="c_in")
    assert [t.data_ptr() for t in kept] == [sigma.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_an_empty_batch_stays_empty(shape):
    z0, sigma = inputs(shape)
    z, dz0 = with_grads(lambda z0: add_noise(z0, sigma, DRAW, scale="c_in"), z0)
    assert z.shape == dz0.shape == shape


def test_is_a_well_formed_torch_op():
    z0, sigma = inputs((3, 9))
    args = z0, sigma, torch.empty_like(z0), *DRAW.arguments(3, 9, z0.device), True, 0.5
    torch.library.opcheck(_forward_op, args)


@pytest.mark.parametrize("scale", [None, "c_in"])
def test_compiles_without_graph_breaks(scale):
    z0, sigma = inputs((3, 9))
    f = lambda z0: add_noise(z0, sigma, DRAW, scale=scale)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, with_grads(compiled, z0), with_grads(f, z0)))


@pytest.mark.parametrize("scale", [None, "c_in"])
def test_plain_torch_agrees_with_differences_in_float64(scale):
    with use_implementation("torch"):
        z0, sigma = inputs((3, 5))
        z0 = z0.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda z0: add_noise(z0, sigma, DRAW, scale=scale), z0)


def test_refuses_a_second_derivative():
    z0, sigma = inputs((3, 5))
    z = add_noise(z0.requires_grad_(), sigma, DRAW)
    with pytest.raises(RuntimeError, match="add_noise has no second derivative"):
        torch.autograd.grad(z.sum(), z0, create_graph=True)


# autograd would cast it too, but not for whoever calls the backward without it
@pytest.mark.parametrize("scaled", [False, True])
def test_backward_gives_the_dtype_that_is_asked_for(scaled):
    dz, sigma = inputs((3, 9))
    options = _Options(scaled, 0.5, torch.float32)
    assert add_noise_backward(dz, sigma, options, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "c_out"}, "scale must be None or c_in, got c_out"),
        ({"dtype": torch.int32}, "dtype must be one of float32, bfloat16, .*, got torch.int32"),
        ({"z0": torch.zeros(3, 5).long()}, "z0 must be one of float32"),
        ({"sigma": torch.ones(4)}, r"sigma must be \(3,\) torch.float32"),
        ({"sigma_data": -1.0}, "sigma_data must be positive, got -1.0"),
        ({"draw": Draw(0, 0, 2**32 - 2)}, "at most 4294967296, got 4294967294"),
        ({"z0": torch.empty(3, 2**34 + 1, device="meta")}, "sigma must be .* on meta"),
    ],
)
def test_rejects(change, message):
    given = {"z0": torch.zeros(3, 5), "sigma": torch.ones(3), "draw": DRAW} | change
    with pytest.raises(ValueError, match=message):
        add_noise(given.pop("z0"), given.pop("sigma"), given.pop("draw"), **given)


@pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
def test_a_level_that_is_none_is_an_error_on_a_cpu_and_nan_in_a_kernel(level):
    z0, sigma = torch.randn(3, 5), torch.tensor([1.0, level, 2.0])
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, got {level}$"):
        add_noise(z0.cpu(), sigma.cpu(), DRAW)
    z = torch.empty_like(z0)
    _forward_triton(z0, sigma, z, *DRAW.arguments(3, 5, z0.device), False, 0.5)
    assert z.isnan().all(1).tolist() == [False, True, False]
