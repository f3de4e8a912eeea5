import math

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from implementations import implementations
from ops.score_case import DRAW, DTYPES, SIGMA, inputs, noise_like, results

from dbkernels.ops import _noise, add_noise, reference
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw
from dbkernels.ops.score_loss import _forward_op, _forward_triton, score_loss, score_loss_

# (3,) has one element to a sample; 7 and 231 are odd; 1040 has a second tile of 16 elements
SHAPES = [(3,), (3, 7), (2, 3, 7, 11), (3, 1040)]
OPTIONS = [
    {},
    {"weight": "none", "reduction": "sum"},
    {"weight": (1.5, 0.3, 2.0), "reduction": "none"},
    {"mask": 1},
    {"mask": 2, "weight": "none"},
    {"mask": 3, "weight": (1.5, 0.3, 2.0), "reduction": "sum"},
]
NAMES = ["loss", "losses", "dprediction", "dz0"]


@pytest.fixture(params=implementations("score_loss_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def options_of(options, shape):
    options = {"sigma_data": 0.3, **options}
    if isinstance(options.get("weight"), tuple):
        options["weight"] = torch.tensor(options["weight"][: shape[0]])
    if "mask" in options:
        options["mask"] = torch.rand(shape[: options["mask"]]) > 0.4
        options["mask"][0] = True
    return options


def assert_accurate(prediction, z0, sigma, **options):
    noise = noise_like(z0)
    actual = results(score_loss, prediction, z0, sigma, DRAW, **options)
    eager = results(reference.score_loss, prediction, z0, sigma, noise, **options)
    wide = (t.double() for t in (prediction, z0, sigma, noise))
    exact = results(reference.score_loss, *wide, **options)
    for name, *result in zip(NAMES, actual, eager, exact, strict=True):
        assert result[0].shape == result[1].shape
        assert result[0].dtype == result[1].dtype
        assert_as_accurate_as_eager(name, *result)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, options):
    assert_accurate(*inputs(shape), **options_of(options, shape))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_as_accurate_as_eager_in_16_bits(shape, dtype, options):
    assert_accurate(*inputs(shape, dtype), **options_of(options, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_incoming_gradient_scales_the_stored_one(dtype):
    prediction, z0, sigma = inputs((3, 40), dtype)
    options = {"sigma_data": 0.5, "reduction": "none"}
    leaves = prediction.requires_grad_(), z0.requires_grad_()
    loss, _ = score_loss(*leaves, sigma, DRAW, **options)
    dloss = torch.tensor([0.7, -3.1, 0.0])
    stored = torch.autograd.grad(loss, leaves, torch.ones(3), retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, dloss)
    for before, after in zip(stored, scaled, strict=True):
        assert torch.equal(after, (before.float() * dloss[:, None]).to(dtype))


@pytest.mark.parametrize("z0_dtype", DTYPES, ids=str)
def test_prediction_and_target_may_have_different_dtypes(z0_dtype):
    assert_accurate(*inputs((3, 40), torch.bfloat16, z0_dtype), sigma_data=0.5)


def test_the_gradient_reaches_the_target_through_the_network_too():
    """With F = 2 z of add_noise, the whole is the loss of D at one point of a function of z0."""
    _, z0, sigma = inputs((3, 40))
    noise, draw, z0 = noise_like(z0), DRAW, z0.requires_grad_()
    c_in = {"scale": "c_in", "sigma_data": 0.3}
    fused, _ = score_loss(2 * add_noise(z0, sigma, draw, **c_in), z0, sigma, draw, sigma_data=0.3)
    z = 2 * reference.add_noise(z0, sigma, noise, **c_in)
    plain, _ = reference.score_loss(z, z0, sigma, noise, sigma_data=0.3)
    actual, expected = (torch.autograd.grad(loss, z0)[0] for loss in (fused, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_network_has_no_loss():
    _, z0, sigma = inputs((3, 50))
    noise, s = noise_like(z0), (sigma**2 + 0.25).sqrt()[:, None]
    perfect = (sigma[:, None] / 0.5 * z0 - 0.5 * noise) / s
    _, losses = score_loss(perfect, z0, sigma, DRAW, sigma_data=0.5)
    assert losses.max() < 1e-10


@pytest.mark.parametrize("step", [0, 1, 2**33])
def test_the_loss_and_its_gradient_are_unbiased_under_the_noise_drawn(step):
    # known of a network alpha * c_in * z, where D - z0 = (beta - 1) z0 + beta sigma n
    elements, alpha, sigma, draw = 20_000, 0.7, torch.tensor(SIGMA), Draw(11, step)
    s2 = sigma.double() ** 2 + 0.25
    c_skip, per_alpha, weight = 0.25 / s2, 0.5 * sigma / s2, s2 / (0.5 * sigma) ** 2
    beta = c_skip + alpha * per_alpha
    z0 = torch.full((3, elements), 1.5)
    slope = torch.full((3, 1), alpha, requires_grad=True)
    prediction = slope * add_noise(z0, sigma, draw, scale="c_in", sigma_data=0.5)
    loss, losses = score_loss(prediction, z0, sigma, draw, sigma_data=0.5, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, slope)
    shift, spread = (beta - 1) * 1.5, beta * sigma  # of a normal error
    expected = weight * (shift**2 + spread**2)
    deviation = weight * (4 * shift**2 * spread**2 + 2 * spread**4).sqrt() / elements**0.5
    assert ((losses - expected).abs() <= 4 * deviation + 1e-5 * expected).all()
    expected = 2 * weight * per_alpha * (shift * 1.5 + beta * sigma**2)
    # of e * z with e = shift + spread n and z = 1.5 + sigma n
    linear, square = shift * sigma + 1.5 * spread, spread * sigma
    deviation = 2 * weight * per_alpha * (linear**2 + 2 * square**2).sqrt() / elements**0.5
    assert ((gradient[:, 0] - expected).abs() <= 4 * deviation + 1e-5 * expected.abs()).all()


def test_losses_are_those_that_the_reduction_reduces():
    args = inputs((3, 50))
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum), ("none", torch.clone)):
        loss, losses = score_loss(*args, DRAW, sigma_data=0.5, reduction=reduction)
        assert torch.equal(loss, reduce(losses))
        assert losses.shape == (3,) and not losses.requires_grad


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_does_not_count_may_be_anything(dims):
    prediction, z0, sigma = inputs((3, 4, 6))
    mask = torch.rand((3, 4, 6)[:dims]) > 0.5
    mask[1] = False
    left_out = ~mask.view(*mask.shape, *[1] * (3 - dims)).expand(3, 4, 6)
    options = {"sigma_data": 0.5, "mask": mask}
    expected = results(score_loss, prediction, z0, sigma, DRAW, **options)
    prediction[left_out], z0[left_out] = torch.nan, torch.inf
    actual = results(score_loss, prediction, z0, sigma, DRAW, **options)
    assert all(map(torch.equal, actual, expected))
    assert not actual[2][left_out].any() and not actual[3][left_out].any()
    assert actual[1][1] == 0


def test_what_is_not_finite_shows_where_it_is():
    prediction, z0, sigma = inputs((3, 1030))
    prediction[0, 1027], prediction[1, 5] = torch.nan, torch.inf
    loss, losses, dprediction, dz0 = results(
        score_loss, prediction, z0, sigma, DRAW, sigma_data=0.5
    )
    assert loss.isnan() and losses[0].isnan() and losses[1] == torch.inf and losses[2].isfinite()
    for grad in (dprediction, dz0):
        assert grad.isfinite().sum() == grad.numel() - 2
        assert grad[0, 1027].isnan() and grad[1, 5].isinf()


# 5 and 210 are no multiples of 4, nor is 1050 of a tile; 42 masks begin amid a vector
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_mask_of_leading_dimensions_is_that_of_their_elements(dims):
    prediction, z0, sigma = inputs((3, 5, 210))
    prediction, z0 = (t.view(3, 5, 42, 5) for t in (prediction, z0))
    mask = torch.rand((3, 5, 42)[:dims]) > 0.5
    whole = mask.view(*mask.shape, *[1] * (4 - dims)).expand(3, 5, 42, 5).contiguous()
    args = prediction, z0, sigma, DRAW
    actual = results(score_loss, *args, sigma_data=0.5, mask=mask)
    expected = results(score_loss, *args, sigma_data=0.5, mask=whole)
    # the share of what counts may be rounded otherwise
    torch.testing.assert_close(actual, expected, rtol=4e-7, atol=0)


def test_same_bits_every_run():
    args = inputs((3, 1500))
    first, second = (results(score_loss, *args, DRAW, sigma_data=0.5) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_launch_shape_changes_no_bit_of_a_gradient(monkeypatch):
    args, mask = inputs((3, 700)), torch.rand(3, 700) > 0.5
    options = {"sigma_data": 0.5, "mask": mask}
    expected = results(score_loss, *args, DRAW, **options)
    monkeypatch.setattr(_noise, "MAX_TILE", 128)
    monkeypatch.setattr(_noise, "CHUNK", 256)
    actual = results(score_loss, *args, DRAW, **options)
    assert all(map(torch.equal, actual[2:], expected[2:]))
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=0)


def test_a_micro_batch_is_its_rows_of_the_batch():
    args, options = inputs((3, 300)), {"sigma_data": 0.5, "reduction": "sum"}
    whole = results(score_loss, *args, Draw(1, 2, 0), **options)
    part = results(score_loss, *(t[1:] for t in args), Draw(1, 2, 1), **options)
    assert all(torch.equal(a, b[1:]) for a, b in zip(part[2:], whole[2:], strict=True))
    torch.testing.assert_close(part[1], whole[1][1:], rtol=1e-6, atol=0)


def test_strides_change_no_bit():
    prediction, z0, sigma = inputs((3, 8, 10))
    mask = torch.rand(3, 8) > 0.3
    expected = results(score_loss, prediction, z0, sigma, DRAW, sigma_data=0.5, mask=mask)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (prediction, z0)]
    spread, mask = sigma.repeat_interleave(2)[::2], mask.T.contiguous().T
    actual = results(score_loss, *turned, spread, DRAW, sigma_data=0.5, mask=mask)
    assert all(map(torch.equal, actual, expected))


def test_changes_none_of_its_arguments():
    args = inputs((3, 9))
    before = [t.clone() for t in args]
    results(score_loss, *args, DRAW, sigma_data=0.5)
    assert all(map(torch.equal, args, before))


def test_an_empty_batch_has_zero_gradients():
    prediction, z0, sigma = inputs((0, 5))
    *_, dprediction, dz0 = results(score_loss, prediction, z0, sigma, DRAW, sigma_data=0.5)
    assert dprediction.shape == dz0.shape == (0, 5)
    loss, _ = score_loss(prediction, z0, sigma, DRAW, sigma_data=0.5, reduction="sum")
    assert loss == 0


def test_samples_without_elements_have_no_loss():
    loss, losses = score_loss(*inputs((3, 0)), DRAW, sigma_data=0.5)
    assert loss == 0 and torch.equal(losses, torch.zeros(3))


@pytest.mark.parametrize("extra", [False, True])
def test_is_a_well_formed_torch_op(extra):
    prediction, z0, sigma = inputs((3, 9))
    given = torch.ones(3), torch.ones(3, 9).bool(), torch.empty(3, 9), torch.empty(3, 9)
    optional = given if extra else [None] * 4
    draw = DRAW.arguments(3, 9, z0.device)
    args = prediction, z0, sigma, *optional, torch.empty(3), *draw, 0.5, 1.0
    torch.library.opcheck(_forward_op, args)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[4]], ids=str)
def test_compiles_without_graph_breaks(options):
    args, options = inputs((3, 9)), options_of(options, (3, 9))
    torch.compiler.reset()
    compiled = torch.compile(score_loss, backend="aot_eager", fullgraph=True)
    actual = results(compiled, *args, DRAW, **options)
    assert all(map(torch.equal, actual, results(score_loss, *args, DRAW, **options)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_torch_agrees_with_differences_in_float64(options):
    with use_implementation("torch"):
        prediction, z0, sigma = inputs((2, 3, 4, 2))
        options = options_of(options, (2, 3, 4, 2))
        leaves = [t.double().requires_grad_() for t in (prediction, z0)]
        assert torch.autograd.gradcheck(
            lambda *leaves: score_loss(*leaves, sigma, DRAW, **options)[0], leaves
        )


def test_refuses_a_second_derivative():
    prediction, z0, sigma = inputs((3, 5))
    loss, _ = score_loss(prediction.requires_grad_(), z0, sigma, DRAW, sigma_data=0.5)
    with pytest.raises(RuntimeError, match="score_loss has no second derivative"):
        torch.autograd.grad(loss, prediction, create_graph=True)


@pytest.mark.parametrize("op", [score_loss, score_loss_])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(3, 4)}, "prediction must have the shape of z0"),
        ({"sigma": torch.ones(4)}, r"sigma must be \(3,\) torch.float32"),
        ({"sigma_data": 0.0}, "sigma_data must be positive, got 0.0"),
        ({"draw": Draw(0, 0, 2**32 - 2)}, "at most 4294967296, got 4294967294"),
        ({"weight": "snr"}, "weight must be edm, none or a tensor, got snr"),
    ],
)
def test_rejects(op, change, message):
    z0 = torch.zeros(3, 5)
    given = {"prediction": z0, "z0": z0, "sigma": torch.ones(3), "draw": DRAW, "sigma_data": 0.5}
    with pytest.raises(ValueError, match=message):
        op(**given | change)


@pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
def test_a_level_that_is_none_is_an_error_on_a_cpu_and_nan_in_a_kernel(level):
    prediction, z0, _ = inputs((3, 5))
    sigma = torch.tensor([1.0, level, 2.0])
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, got {level}$"):
        score_loss(prediction.cpu(), z0.cpu(), sigma.cpu(), DRAW, sigma_data=0.5)
    dprediction, losses = torch.empty_like(prediction), torch.empty(3)
    _forward_triton(
        prediction, z0, sigma, None, None, dprediction, None, losses,
        *DRAW.arguments(3, 5, z0.device), 0.5, 1.0,
    )  # fmt: skip
    expected = [False, True, False]
    assert losses.isnan().tolist() == dprediction.isnan().all(1).tolist() == expected


def test_nothing_is_written_over_where_a_level_is_none():
    prediction, z0, sigma = inputs((3, 5))
    leaf = prediction.cpu().requires_grad_()
    computed = leaf * 2
    before = computed.detach().clone()
    with pytest.raises(ValueError, match="sigma must be positive"):
        score_loss_(computed, z0.cpu(), 0 * sigma.cpu(), DRAW, sigma_data=0.5)
    assert torch.equal(computed, before)
