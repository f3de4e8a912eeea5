"""`add_noise` and `score_loss`: how exact they are, what they write, and what they refuse."""

import math

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from implementations import implementations
from ops.noise_inputs import (
    DRAW,
    DTYPES,
    LEADING,
    Tensors,
    losses,
    noise_like,
    noisy,
    tensors,
)

from dbkernels.ops import add_noise, reference, score_loss
from dbkernels.ops.add_noise import _forward_op as noise_op
from dbkernels.ops.add_noise import _forward_triton as noise_in_triton
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.philox import Draw
from dbkernels.ops.score_loss import _forward_op as loss_op
from dbkernels.ops.score_loss import _forward_triton as loss_in_triton

# (3,) has one element to a sample; 7 and 231 are odd; 1040 has a second tile of 16 elements. Of a
# token are 1 and 77 elements, and 210, amid which tiles and vectors end
SAMPLES = [(shape, "sample") for shape in [(3,), (3, 7), (2, 3, 7, 11), (3, 1040)]]
TOKENS = [(shape, "token") for shape in [(3, 1040), (2, 3, 7, 11), (2, 5, 210)]]
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"weight": "sample", "reduction": "none"},
    {"mask": 1},
    {"mask": 2, "weight": "token"},
    {"mask": 2},
    {"mask": 3, "weight": "sample", "reduction": "sum"},
]
over = pytest.mark.parametrize(("shape", "per"), SAMPLES + TOKENS, ids=str)
each = pytest.mark.parametrize(("run", "op"), [(noisy, add_noise), (losses, score_loss)])


@pytest.fixture(params=implementations("score_loss_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def given(options, shape):
    options = dict(options)
    if "weight" in options:
        options["weight"] = 0.3 + 2 * torch.rand(shape[: LEADING[options["weight"]]])
    if "mask" in options:
        options["mask"] = torch.rand(shape[: options["mask"]]) > 0.4
        options["mask"][0] = True
    return options


def assert_accurate(names, actual, eager, exact):
    for name, *result in zip(names, actual, eager, exact, strict=True):
        assert result[0].shape == result[1].shape and result[0].dtype == result[1].dtype
        assert_as_accurate_as_eager(name, *result)


def assert_loss_is_accurate(t, **options):
    noise = noise_like(t.z0)
    wide = {n: v.double() if n == "weight" else v for n, v in options.items()}
    assert_accurate(
        ["loss", "losses", "dprediction", "dz0"],
        losses(score_loss, t, DRAW, **options),
        losses(reference.score_loss, t, noise, **options),
        losses(reference.score_loss, Tensors(*(x.double() for x in t)), noise.double(), **wide),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over
def test_the_noisy_target_is_as_accurate_as_eager(shape, per, dtype):
    t = tensors(shape, per, dtype)
    t, noise = t._replace(z0=30 + t.z0), noise_like(t.z0)

    def rounded(*args):
        return reference.add_noise(*args).to(dtype)

    exact = noisy(reference.add_noise, Tensors(*(x.double() for x in t)), noise.double())
    assert_accurate(["z", "dz0"], noisy(add_noise, t, DRAW), noisy(rounded, t, noise), exact)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((torch.float32, options) for options in OPTIONS),
        *((dtype, OPTIONS[i]) for dtype in DTYPES[1:] for i in (0, 4)),
    ],
    ids=str,
)
@over
def test_the_loss_is_as_accurate_as_eager(shape, per, dtype, options):
    assert_loss_is_accurate(tensors(shape, per, dtype), **given(options, shape))


@pytest.mark.parametrize("z0_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_may_have_a_dtype_of_its_own(dtype, z0_dtype):
    t = tensors((3, 40), dtype=dtype, z0_dtype=z0_dtype)
    assert_loss_is_accurate(t)
    exact = reference.add_noise(*(x.double() for x in t[1:]), noise_like(t.z0).double())
    z = add_noise(*t[1:], DRAW, dtype=dtype)
    assert z.dtype == dtype
    assert_as_accurate_as_eager("z", z, exact.to(dtype), exact)
    one = torch.ones(3)
    z = add_noise(t.z0.requires_grad_(), one, one, DRAW, dtype=dtype)
    (dz0,) = torch.autograd.grad(z.sum(), t.z0)
    assert dz0.dtype == z0_dtype and torch.equal(dz0, torch.ones_like(t.z0))


@pytest.mark.parametrize("shape", [(3, 1040), (3, 5, 210), (3, 4, 6, 2)], ids=str)
def test_what_a_sample_says_is_what_each_of_its_tokens_says(shape):
    t, weight = tensors(shape), torch.rand(3)
    spread, weights = (
        [x[:, None].expand(shape[:2]).contiguous() for x in some] for some in (t[2:], [weight])
    )
    of_tokens, mask = Tensors(*t[:2], *spread), torch.rand(shape[:2]) > 0.5
    assert all(map(torch.equal, noisy(add_noise, of_tokens, DRAW), noisy(add_noise, t, DRAW)))
    expected = losses(score_loss, t, DRAW, weight=weight, mask=mask)
    for mixed in [(of_tokens, *weights), (of_tokens, weight), (t, *weights)]:
        actual = losses(score_loss, mixed[0], DRAW, weight=mixed[1], mask=mask)
        assert all(map(torch.equal, actual[2:], expected[2:]))
        torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_incoming_gradient_scales_the_stored_one(dtype):
    prediction, z0, *coefficients = tensors((3, 40), dtype=dtype)
    leaves = prediction.requires_grad_(), z0.requires_grad_()
    loss, _ = score_loss(*leaves, *coefficients, DRAW, reduction="none")
    dloss = torch.tensor([0.7, -3.1, 0.0])
    stored = torch.autograd.grad(loss, leaves, torch.ones(3), retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, dloss)
    for before, after in zip(stored, scaled, strict=True):
        assert torch.equal(after, (before.float() * dloss[:, None]).to(dtype))


def test_the_gradient_reaches_the_target_through_the_network_too():
    """With F = 2 z of add_noise, the whole is the loss at one point of a function of z0."""
    _, z0, *ab = tensors((3, 40))
    (_, _, *pq), noise, z0 = tensors((3, 40)), noise_like(z0), z0.requires_grad_()
    fused, _ = score_loss(2 * add_noise(z0, *pq, DRAW), z0, *ab, DRAW)
    plain, _ = reference.score_loss(2 * reference.add_noise(z0, *pq, noise), z0, *ab, noise)
    actual, expected = (torch.autograd.grad(loss, z0)[0] for loss in (fused, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_network_has_no_loss():
    _, *t = tensors((3, 50))
    _, each_loss = score_loss(reference.add_noise(*t, noise_like(t[0])), *t, DRAW)
    assert each_loss.max() < 1e-10


@pytest.mark.parametrize("step", [0, 1, 2**33])
def test_the_loss_and_its_gradient_are_unbiased_under_the_noise_drawn(step):
    # known of a network slope * z, where e = (slope p - alpha) z0 + (slope q - beta) n
    elements, slope, draw = 20_000, 0.7, Draw(11, step)
    p, q = torch.tensor([0.9, 0.05, 0.5]), torch.tensor([0.1, 1.0, -3.0])
    alpha, beta = torch.tensor([0.1, 2.0, -1.0]), torch.tensor([-1.0, 0.3, 2.0])
    weight, z0 = torch.tensor([1.5, 0.3, 1.0]), torch.full((3, elements), 1.5)
    leaf = torch.full((3, 1), slope, requires_grad=True)
    loss, each_loss = score_loss(
        leaf * add_noise(z0, p, q, draw), z0, alpha, beta, draw, weight=weight, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    shift, spread = (slope * p - alpha) * 1.5, slope * q - beta  # of a normal error
    expected = weight * (shift**2 + spread**2)
    deviation = weight * (4 * shift**2 * spread**2 + 2 * spread**4).sqrt() / elements**0.5
    assert ((each_loss - expected).abs() <= 4 * deviation + 1e-5 * expected).all()
    expected = 2 * weight * (shift * p * 1.5 + spread * q)
    # of e * z with e = shift + spread n and z = 1.5 p + q n
    linear, square = shift * q + 1.5 * p * spread, spread * q
    deviation = 2 * weight * (linear**2 + 2 * square**2).sqrt() / elements**0.5
    assert ((gradient[:, 0] - expected).abs() <= 4 * deviation + 1e-5 * expected.abs()).all()


def test_losses_are_those_that_the_reduction_reduces():
    t = tensors((3, 50))
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum), ("none", torch.clone)):
        loss, each_loss = score_loss(*t, DRAW, reduction=reduction)
        assert torch.equal(loss, reduce(each_loss))
        assert each_loss.shape == (3,) and not each_loss.requires_grad


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_does_not_count_may_be_anything(dims):
    t, mask = tensors((3, 4, 6)), torch.rand((3, 4, 6)[:dims]) > 0.5
    mask[1] = False
    left_out = ~reference.over_elements(mask, t.z0).expand(3, 4, 6)
    expected = losses(score_loss, t, DRAW, mask=mask)
    t.prediction[left_out], t.z0[left_out] = torch.nan, torch.inf
    actual = losses(score_loss, t, DRAW, mask=mask)
    assert all(map(torch.equal, actual, expected))
    assert not actual[2][left_out].any() and not actual[3][left_out].any()
    assert actual[1][1] == 0


def test_what_is_not_finite_shows_where_it_is():
    t = tensors((3, 1030))
    t.prediction[0, 1027], t.prediction[1, 5] = torch.nan, torch.inf
    loss, each_loss, *grads = losses(score_loss, t, DRAW)
    assert loss.isnan() and each_loss[0].isnan()
    assert each_loss[1] == torch.inf and each_loss[2].isfinite()
    for grad in grads:
        assert grad.isfinite().sum() == grad.numel() - 2
        assert grad[0, 1027].isnan() and grad[1, 5].isinf()


# 5 and 210 are no multiples of 4, nor is 1050 of a tile; 42 masks begin amid a vector
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_mask_of_leading_dimensions_is_that_of_their_elements(dims):
    t, mask = tensors((3, 5, 42, 5)), torch.rand((3, 5, 42)[:dims]) > 0.5
    whole = reference.over_elements(mask, t.z0).expand(3, 5, 42, 5).contiguous()
    actual, expected = (losses(score_loss, t, DRAW, mask=each) for each in (mask, whole))
    # the share of what counts may be rounded otherwise
    torch.testing.assert_close(actual, expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("per", ["sample", "token"])
@each
def test_strides_change_no_bit(run, op, per):
    t, mask, weight = tensors((3, 8, 10), per), torch.rand(3, 8) > 0.3, torch.rand(3, 8)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t[:2]]
    spread = [x.repeat_interleave(2, 0)[::2] for x in t[2:]]
    options = {"mask": mask, "weight": weight} if op is score_loss else {}
    strided = {name: x.T.contiguous().T for name, x in options.items()}
    actual = run(op, Tensors(*turned, *spread), DRAW, **strided)
    assert all(map(torch.equal, actual, run(op, t, DRAW, **options)))


def test_the_incoming_gradient_may_have_any_strides():
    _, z0, p, q = tensors((3, 8, 10), "token")
    z = add_noise(z0.requires_grad_(), p, q, DRAW)
    for dz in (torch.ones(()).expand(3, 8, 10), torch.randn(3, 10, 8).transpose(1, 2)):
        (actual,) = torch.autograd.grad(z, z0, dz, retain_graph=True)
        assert torch.equal(actual, dz * p[..., None])


@each
def test_changes_none_of_its_arguments(run, op):
    t = tensors((3, 9))
    before = [x.clone() for x in t]
    run(op, t, DRAW)
    assert all(map(torch.equal, t, before))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 5), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
def test_without_elements_there_is_nothing_to_do_and_no_loss(shape, per):
    t = tensors(shape, per)
    assert [x.shape for x in noisy(add_noise, t, DRAW)] == [shape, shape]
    for mask in (None, torch.ones(shape).bool()):
        loss, each_loss, *grads = losses(score_loss, t, DRAW, reduction="sum", mask=mask)
        assert loss == 0 and torch.equal(each_loss, torch.zeros(shape[0]))
        assert [x.shape for x in grads] == [shape, shape]


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("extra", [False, True])
def test_are_well_formed_torch_ops(extra, per):
    prediction, z0, a, b = tensors((3, 9), per)
    draw = DRAW.arguments(3, 9, z0.device)
    torch.library.opcheck(noise_op, (z0, a, b, torch.empty_like(z0), *draw))
    optional = a.abs(), torch.ones(3, 9).bool(), torch.empty(3, 9), torch.empty(3, 9)
    optional = optional if extra else [None] * 4
    args = prediction, z0, a, b, *optional, torch.empty(3), *draw, 1.0
    torch.library.opcheck(loss_op, args)


@pytest.mark.parametrize(
    ("run", "op", "options"),
    [(noisy, add_noise, {}), *((losses, score_loss, OPTIONS[i]) for i in (0, 2, 4))],
)
def test_compiles_without_graph_breaks(run, op, options):
    t, options = tensors((3, 9)), given(options, (3, 9))
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    actual = run(compiled, t, DRAW, **options)
    assert all(map(torch.equal, actual, run(op, t, DRAW, **options)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
def test_plain_torch_agrees_with_differences_in_float64(options, per):
    with use_implementation("torch"):
        shape = (2, 3, 4, 2)
        prediction, z0, a, b = tensors(shape, per)
        options = given(options, shape)
        leaves = [t.double().requires_grad_() for t in (prediction, z0)]
        assert torch.autograd.gradcheck(
            lambda *leaves: score_loss(*leaves, a, b, DRAW, **options)[0], leaves
        )
        assert torch.autograd.gradcheck(lambda z0: add_noise(z0, a, b, DRAW), leaves[1])


@each
def test_refuses_a_second_derivative(run, op):
    prediction, z0, *ab = tensors((3, 5))
    leaves = [prediction, z0.requires_grad_()][op is add_noise :]
    y = op(*leaves, *ab, DRAW)[0].sum()
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no second derivative"):
        torch.autograd.grad(y, z0, create_graph=True)


ALL = [add_noise, score_loss]
REJECTED = [
    (ALL, {"z0": torch.zeros(())}, r"z0 must be \(B, ...\), got a scalar"),
    (ALL, {"z0": torch.zeros(3, 5).long()}, "z0 must be one of float32"),
    (ALL, {"a": torch.ones(4)}, r"must be \(B,\) = \(3,\) or \(B, T\) = \(3, 5\), .* \(4,\)"),
    (ALL, {"a": torch.ones(5, 3)}, r"must be \(B,\) = \(3,\) or .* got \w+ \(5, 3\) torch.float"),
    (ALL, {"b": torch.ones(3, 5)}, r"(p and q|alpha and beta) must be .* got (q|beta) \(3, 5\)"),
    (ALL, {"a": torch.ones(3).double()}, "torch.float32 on .*, got (p|alpha) .*torch.float64"),
    (ALL, {"b": torch.ones(3).requires_grad_()}, "(q|beta) must not require a gradient"),
    (ALL, {"a": torch.ones(3, device="meta")}, r"got (p|alpha) \(3,\) torch.float32 on meta"),
    (ALL, {"draw": Draw(0, 0, 2**32 - 2)}, "at most 4294967296, got 4294967294"),
    ([add_noise], {"dtype": torch.int32}, "dtype must be one of float32, .*, got torch.int32"),
    (
        [score_loss],
        {"prediction": torch.zeros(3, 4)},
        r"prediction must have the shape of z0 = \(3, 5\), got \(3, 4\)",
    ),
    ([score_loss], {"prediction": torch.zeros(3, 5).int()}, "prediction must be one of float32"),
    (
        [score_loss],
        {"prediction": torch.zeros(3, 5, device="meta")},
        "prediction and z0 must be on one device",
    ),
    ([score_loss], {"reduction": "max"}, "reduction must be one of mean, sum, none, got max"),
    ([score_loss], {"weight": torch.ones(4)}, r"weight must be \(B,\) = \(3,\) .*got .*\(4,\)"),
    ([score_loss], {"weight": torch.ones(3).int()}, "weight must be .* got .* torch.int32"),
    ([score_loss], {"weight": torch.ones(3, device="meta")}, "weight must be .* on meta"),
    ([score_loss], {"weight": torch.ones(3).requires_grad_()}, "weight must not require a grad"),
    ([score_loss], {"mask": torch.ones(3, 4).bool()}, r"mask must be bool .*, got \(3, 4\)"),
    ([score_loss], {"mask": torch.ones(3, 5)}, r"mask must be bool .*, got \(3, 5\) torch.float32"),
    ([score_loss], {"mask": torch.ones(()).bool()}, r"mask must be bool of the shape .*, got \(\)"),
    ([score_loss], {"mask": torch.ones(3, 5, 1).bool()}, r"got \(3, 5, 1\)"),
    ([score_loss], {"mask": torch.ones(3, device="meta").bool()}, "mask must be on .*, got meta"),
]


@pytest.mark.parametrize(
    ("op", "change", "message"), [(op, *rest) for ops, *rest in REJECTED for op in ops]
)
def test_rejects(op, change, message):
    device = torch.empty(()).device
    change = {
        name: x.to(device) if isinstance(x, torch.Tensor) and x.is_cpu else x
        for name, x in change.items()
    }
    one, zero = torch.ones(3), torch.zeros(3, 5)
    args = {"prediction": zero, "z0": zero, "a": one, "b": one, "draw": DRAW} | change
    names = ["prediction", "z0", "a", "b", "draw"][op is add_noise :]
    positional = [args.pop(name) for name in names]
    args.pop("prediction", None)
    with pytest.raises(ValueError, match=message):
        op(*positional, **args)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_coefficients_must_be_finite_and_show_in_a_kernel_that_does_not_look(value):
    t, wrong = tensors((3, 5)), torch.tensor([1.0, value, 2.0])
    prediction, z0, a, b = (x.cpu() for x in t)
    for place, name in enumerate("pq"):
        args = [z0, a, b]
        args[1 + place] = wrong.cpu()
        with pytest.raises(ValueError, match=f"{name} must be finite, got {value}$"):
            add_noise(*args, DRAW)
    for place, name in enumerate(["alpha", "beta", "weight"]):
        args = [prediction * 1, z0, a, b, a]
        args[2 + place] = wrong.cpu()
        before = args[0].clone()
        with pytest.raises(ValueError, match=f"{name} must be finite, got {value}$"):
            score_loss(*args[:4], DRAW, weight=args[4], inplace=True)
        assert torch.equal(args[0], before)
    z, dprediction, each_loss = torch.empty(3, 5), torch.empty(3, 5), torch.empty(3)
    draw = DRAW.arguments(3, 5, z.device)
    noise_in_triton(t.z0, t.a, wrong, z, *draw)
    loss_in_triton(
        t.prediction, t.z0, t.a, wrong, None, None, dprediction, None, each_loss, *draw, 1.0
    )
    for shown in (z, dprediction, each_loss[:, None]):
        assert shown.isfinite().all(1).tolist() == [True, False, True]
        assert not shown[1].isfinite().any()


# what is kept, and the gradient over the prediction


def saved_by(f):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = f()
    return kept, y


def test_the_noisy_target_keeps_a_coefficient_alone():
    _, z0, p, q = tensors((3, 9))
    kept, _ = saved_by(lambda: add_noise(z0.requires_grad_(), p, q, DRAW))
    assert [t.data_ptr() for t in kept] == [p.data_ptr()]


@pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_kept(asked):
    t = tensors((3, 9))
    expected = losses(score_loss, t, DRAW)
    leaves = [x.requires_grad_(needed) for x, needed in zip(t[:2], asked, strict=True)]
    kept, (loss, _) = saved_by(lambda: score_loss(*t, DRAW))
    assert len(kept) == sum(asked) and torch.equal(loss.detach(), expected[0])
    for leaf, grad in zip(leaves, expected[2:], strict=True):
        if leaf.requires_grad:
            (actual,) = torch.autograd.grad(loss, leaf, torch.tensor(-2.0))
            assert torch.equal(actual, grad)


def test_a_graph_that_is_kept_gives_its_gradient_again():
    t = tensors((3, 9))
    loss, _ = score_loss(t.prediction.requires_grad_(), *t[1:], DRAW)
    upstream = torch.tensor(3.0)
    (first,) = torch.autograd.grad(loss, t.prediction, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(loss, t.prediction, upstream)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_gradient_may_go_over_the_prediction(dtype, per):
    def over_prediction(prediction, *rest, **options):
        return score_loss(prediction * 1, *rest, **options, inplace=True)

    t, mask = tensors((3, 1040), per, dtype), torch.rand(3, 1040) > 0.5
    expected = losses(score_loss, t, DRAW, mask=mask)
    assert all(map(torch.equal, losses(over_prediction, t, DRAW, mask=mask), expected))


def test_the_gradient_lies_where_the_prediction_lay():
    t, grads = tensors((3, 9)), []
    computed = t.prediction.requires_grad_() + 0
    computed.register_hook(grads.append)
    loss, _ = score_loss(computed, *t[1:], DRAW, inplace=True)
    loss.backward()
    assert grads[0].data_ptr() == computed.data_ptr()


@pytest.mark.parametrize("required", [False, True])
def test_without_a_gradient_nothing_is_written(required):
    t = tensors((3, 9))
    computed = t.prediction.requires_grad_(required) + 0
    with torch.set_grad_enabled(not required):
        score_loss(computed, *t[1:], DRAW, inplace=True)
    assert torch.equal(computed, t.prediction)


# a graph that is kept is not scaled in place, which would tell as well
@pytest.mark.parametrize("kept", [False, True])
def test_whoever_saved_the_prediction_is_told(kept):
    t = tensors((3, 9))
    loss, _ = score_loss(t.prediction.requires_grad_().tanh(), *t[1:], DRAW, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=kept)


def test_rejects_a_leaf_to_write_over():
    t = tensors((3, 5))
    with pytest.raises(ValueError, match="prediction must be computed, got a leaf"):
        score_loss(t.prediction.requires_grad_(), *t[1:], DRAW, inplace=True)
