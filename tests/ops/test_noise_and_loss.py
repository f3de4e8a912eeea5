"""`add_noise` and `score_loss`: how exact they are, what they write, and what they refuse."""

import math
from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from implementations import each_implementation, thinned
from ops.noise_inputs import (
    DRAW,
    DTYPES,
    F32,
    LEADING,
    Tensors,
    losses,
    noise_like,
    noisy,
    tensors,
)
from ops.one_layer import saved_by

from dbkernels.ops import add_noise, normals, reference, score_loss, uniforms
from dbkernels.ops.add_noise import _forward_triton as noise_in_triton
from dbkernels.ops.philox import Draw
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
# each with all options, and the first and the fifth in the other dtypes too
CASES = [
    (shape, per, dtype, options)
    for shape, per in SAMPLES + TOKENS
    for dtype, options in [(F32, each) for each in OPTIONS]
    + [(dtype, OPTIONS[i]) for dtype in DTYPES[1:] for i in (0, 4)]
]
each = pytest.mark.parametrize(("run", "op"), [(noisy, add_noise), (losses, score_loss)])


implementation = each_implementation("score_loss_fwd", autouse=True)
# of what no implementation has for itself
BY_ONE = pytest.mark.parametrize("implementation", ["torch"], indirect=True)


def given(options, shape):
    options = dict(options)
    if "weight" in options:
        options["weight"] = 0.3 + 2 * torch.rand(shape[: LEADING[options["weight"]]])
    if "mask" in options:
        options["mask"] = torch.rand(shape[: options["mask"]]) > 0.4
        options["mask"][0] = True
    return options


def assert_accurate(run, op, t, *, dtype=None, **options):
    """Each result has the dtype of eager's, or of the target, which is rounded in eager too."""
    specification, noise = getattr(reference, op.__name__), noise_like(t.z0)
    wide = {n: v.double() if n == "weight" else v for n, v in options.items()}
    eager = run(specification, t, noise, **options)
    exact = run(specification, Tensors(*(x.double() for x in t)), noise.double(), **wide)
    if op is add_noise:
        eager[0] = eager[0].to(dtype or t.z0.dtype)
        options = {"dtype": dtype}
    for i, result in enumerate(zip(run(op, t, DRAW, **options), eager, exact, strict=True)):
        assert result[0].shape == result[1].shape and result[0].dtype == result[1].dtype
        assert_as_accurate_as_eager(f"result {i}", *result)


@thinned("score_loss_fwd", "shape per dtype options", CASES)
def test_as_accurate_as_eager(shape, per, dtype, options):
    t = tensors(shape, per, dtype)
    assert_accurate(losses, score_loss, t, **given(options, shape))
    if not options:
        assert_accurate(noisy, add_noise, t._replace(z0=30 + t.z0))


@pytest.mark.parametrize("z0_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_may_have_a_dtype_of_its_own(dtype, z0_dtype):
    t = tensors((3, 40), dtype=dtype, z0_dtype=z0_dtype)
    assert_accurate(losses, score_loss, t)
    assert_accurate(noisy, add_noise, t, dtype=dtype)


def copied(numbers, dtype):
    """Through a kernel: 1 x - 0, where a product with the noise is -0, is x and has its sign."""
    of_noise = torch.zeros(1, len(numbers)).copysign(-normals(DRAW, 1, len(numbers)))
    z0 = numbers.view(1, -1, 1)
    return add_noise(z0, torch.ones_like(of_noise), of_noise, DRAW, dtype=dtype).flatten()


def assert_same_numbers(actual, expected):
    """Signs of zeros count, those of NaN mean nothing."""
    assert actual.dtype == expected.dtype and torch.equal(actual.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(actual[there], expected[there])
    assert torch.equal(actual[there].signbit(), expected[there].signbit())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_loaded_and_stored_again(dtype, implementation):
    every = 13 if implementation == "triton" else 1
    numbers = torch.arange(0, 2**16, every).to(torch.int16).view(dtype)
    assert_same_numbers(copied(numbers, torch.float32), numbers.float())
    assert_same_numbers(copied(numbers, dtype), numbers)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_number_is_rounded_to_nearest_and_halves_to_even(dtype):
    places = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # of float32 that a rounding drops
    kept = torch.arange(0, 2**31, (2**31 // 3001) >> places << places)[:, None]
    # halfway between two neighbours, and one bit of float32 to each side of it
    half = 2 ** (places - 1)
    bits = (kept + torch.tensor([0, 1, half - 1, half, half + 1])).flatten()
    bits = bits[bits <= 0x7F800000]
    # an odd neighbour below; the largest number; a NaN whose mark is in places that are dropped
    extra = torch.tensor([0x7F7FFFFF, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
    bits = torch.cat([bits, bits[bits % 2**places == half] ^ 2**places, extra])
    limits = torch.finfo(dtype)
    factors = [0.25, 0.5, 0.5 + 2**-20, 0.75, 1, 1.5, 2.5, 3.5, 1 / limits.eps - 0.5]
    ends = [limits.tiny * limits.eps * factor for factor in factors]
    ends += [limits.max, limits.max * (1 + limits.eps / 4)]
    ends += [65503.9, 65519.99, 65520.0, 65535.9, 65536.0, 131072.0]
    numbers = torch.cat([bits.int().view(torch.float32), torch.tensor(ends)])
    numbers = torch.cat([numbers, -numbers])
    assert_same_numbers(copied(numbers, dtype), numbers.to(dtype))


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
    loss, each_loss = score_loss(*leaves, *coefficients, DRAW, reduction="none")
    assert torch.equal(loss, each_loss) and loss.requires_grad and not each_loss.requires_grad
    dloss = torch.tensor([0.7, -3.1, 0.0])
    stored = torch.autograd.grad(loss, leaves, torch.ones(3), retain_graph=True)
    # a graph that is kept gives its gradient again
    kept = [t.clone() for t in stored]
    scaled = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, dloss)
    for before, untouched, after, last in zip(stored, kept, scaled, again, strict=True):
        assert torch.equal(after, (before.float() * dloss[:, None]).to(dtype))
        assert torch.equal(untouched, before) and torch.equal(last, after)


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


@pytest.mark.parametrize("per", ["sample", "token"])
@each
def test_strides_change_no_bit_and_no_argument_is_changed(run, op, per):
    t, mask, weight = tensors((3, 8, 10), per), torch.rand(3, 8) > 0.3, torch.rand(3, 8)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t[:2]]
    spread = [x.repeat_interleave(2, 0)[::2] for x in t[2:]]
    options = {"mask": mask, "weight": weight} if op is score_loss else {}
    strided = {name: x.T.contiguous().T for name, x in options.items()}
    actual = run(op, Tensors(*turned, *spread), DRAW, **strided)
    before = [x.clone() for x in (*t, mask, weight)]
    assert all(map(torch.equal, actual, run(op, t, DRAW, **options)))
    assert all(map(torch.equal, (*t, mask, weight), before))


def test_the_incoming_gradient_may_have_any_strides():
    _, z0, p, q = tensors((3, 8, 10), "token")
    z = add_noise(z0.requires_grad_(), p, q, DRAW)
    for dz in (torch.ones(()).expand(3, 8, 10), torch.randn(3, 10, 8).transpose(1, 2)):
        (actual,) = torch.autograd.grad(z, z0, dz, retain_graph=True)
        assert torch.equal(actual, dz * p[..., None])


LAST = Draw(1, 2, 2**32 - 3)  # of which there are three samples


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 5), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
def test_without_elements_there_is_nothing_to_do_and_no_loss(shape, per):
    t = tensors(shape, per)
    assert [x.shape for x in noisy(add_noise, t, LAST)] == [shape, shape]
    assert normals(LAST, *shape[:2]).shape == uniforms(LAST, *shape[:2]).shape == shape[:2]
    for mask in (None, torch.ones(shape).bool()):
        loss, each_loss, *grads = losses(score_loss, t, LAST, reduction="sum", mask=mask)
        assert loss == 0 and torch.equal(each_loss, torch.zeros(shape[0]))
        assert [x.shape for x in grads] == [shape, shape]


@pytest.mark.parametrize(
    ("run", "op", "options"),
    [(noisy, add_noise, {}), *((losses, score_loss, OPTIONS[i]) for i in (0, 2, 4))],
)
@BY_ONE
def test_compiles_without_graph_breaks(run, op, options):
    t, options = tensors((3, 9)), given(options, (3, 9))
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    actual = run(compiled, t, DRAW, **options)
    assert all(map(torch.equal, actual, run(op, t, DRAW, **options)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
@BY_ONE
def test_plain_torch_agrees_with_differences_in_float64(options, per):
    shape = (2, 3, 2, 2)
    prediction, z0, a, b = tensors(shape, per)
    options = given(options, shape)
    leaves = [t.double().requires_grad_() for t in (prediction, z0)]
    assert torch.autograd.gradcheck(
        lambda *leaves: score_loss(*leaves, a, b, DRAW, **options)[0], leaves
    )
    assert options or torch.autograd.gradcheck(lambda z0: add_noise(z0, a, b, DRAW), leaves[1])


@each
def test_refuses_a_second_derivative(run, op):
    prediction, z0, *ab = tensors((3, 5))
    leaves = [prediction, z0.requires_grad_()][op is add_noise :]
    y = op(*leaves, *ab, DRAW)[0].sum()
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no second derivative"):
        torch.autograd.grad(y, z0, create_graph=True)


META = {"device": "meta"}
BOTH_REJECT = [
    ({"z0": torch.zeros(())}, r"z0 must be \(B, ...\), got a scalar"),
    ({"z0": torch.zeros(3, 5).long()}, "z0 must be one of float32"),
    ({"a": torch.ones(4)}, r"must be \(B,\) = \(3,\) or \(B, T\) = \(3, 5\), .* \(4,\)"),
    ({"a": torch.ones(5, 3)}, r"must be \(B,\) = \(3,\) or .* got \w+ \(5, 3\) torch.float"),
    ({"b": torch.ones(3, 5)}, r"(p and q|alpha and beta) must be .* got (q|beta) \(3, 5\)"),
    ({"a": torch.ones(3).double()}, "torch.float32 on .*, got (p|alpha) .*torch.float64"),
    ({"b": torch.ones(3).requires_grad_()}, "(q|beta) must not require a gradient"),
    ({"a": torch.ones(3, **META)}, r"got (p|alpha) \(3,\) torch.float32 on meta"),
    ({"draw": Draw(0, 0, 2**32 - 2)}, "at most 4294967296, got 4294967294"),
]
LOSS_REJECTS = [
    ({"prediction": torch.zeros(3, 4)}, r"prediction .* shape of z0 = \(3, 5\), got \(3, 4\)"),
    ({"prediction": torch.zeros(3, 5).int()}, "prediction must be one of float32"),
    ({"prediction": torch.zeros(3, 5, **META)}, "prediction and z0 must be on one device"),
    ({"reduction": "max"}, "reduction must be .*mean, sum.* none, got max"),
    ({"weight": torch.ones(4)}, r"weight must be \(B,\) = \(3,\) .*got .*\(4,\)"),
    ({"weight": torch.ones(3).int()}, "weight must be .* got .* torch.int32"),
    ({"weight": torch.ones(3, **META)}, "weight must be .* on meta"),
    ({"weight": torch.ones(3).requires_grad_()}, "weight must not require a grad"),
    ({"mask": torch.ones(3, 4).bool()}, r"mask must be bool .*, got \(3, 4\)"),
    ({"mask": torch.ones(3, 5)}, r"mask must be bool .*, got \(3, 5\) torch.float32"),
    ({"mask": torch.ones(()).bool()}, r"mask must be bool of the shape .*, got \(\)"),
    ({"mask": torch.ones(3, 5, 1).bool()}, r"got \(3, 5, 1\)"),
    ({"mask": torch.ones(3, **META).bool()}, "mask must be on .*, got meta"),
]
REJECTED = [
    *((op, *case) for op in (add_noise, score_loss) for case in BOTH_REJECT),
    (add_noise, {"dtype": torch.int32}, "dtype must be one of float32, .*, got torch.int32"),
    *((score_loss, *case) for case in LOSS_REJECTS),
]


@pytest.mark.parametrize(("op", "change", "message"), REJECTED)
def test_rejects(op, change, message):
    one, zero = torch.ones(3), torch.zeros(3, 5)
    moved = {n: x.to(zero.device) if getattr(x, "is_cpu", False) else x for n, x in change.items()}
    args = {"prediction": zero, "z0": zero, "a": one, "b": one, "draw": DRAW} | moved
    names = ["prediction", "z0", "a", "b", "draw"][op is add_noise :]
    positional = [args.pop(name) for name in names]
    args.pop("prediction", None)
    with pytest.raises(ValueError, match=message):
        op(*positional, **args)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@BY_ONE
def test_coefficients_must_be_finite_and_show_in_a_kernel_that_does_not_look(value):
    t, wrong = tensors((3, 5)), torch.tensor([1.0, value, 2.0])
    prediction, *of_noise = (x.cpu() for x in t)

    def loss(z0, alpha, beta, weight):
        score_loss(over, z0, alpha, beta, DRAW, weight=weight, inplace=True)

    for op, names in ((partial(add_noise, draw=DRAW), "pq"), (loss, ["alpha", "beta", "weight"])):
        for place, name in enumerate(names):
            args, over = [*of_noise, of_noise[1]][: 1 + len(names)], prediction * 1
            args[1 + place] = wrong.cpu()
            with pytest.raises(ValueError, match=f"{name} must be finite, got {value}$"):
                op(*args)
            assert torch.equal(over, prediction)
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


def test_the_noisy_target_keeps_a_coefficient_alone():
    _, z0, p, q = (x.clone() for x in tensors((3, 9)))
    _, kept = saved_by(lambda: add_noise(z0.requires_grad_(), p, q, DRAW))
    assert list(kept) == [p.data_ptr()]


@pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_kept(asked):
    t = tensors((3, 9))
    expected = losses(score_loss, t, DRAW)
    leaves = [x.requires_grad_(needed) for x, needed in zip(t[:2], asked, strict=True)]
    (loss, _), kept = saved_by(lambda: score_loss(*t, DRAW))
    assert len(kept) == sum(asked) and torch.equal(loss.detach(), expected[0])
    for leaf, grad in zip(leaves, expected[2:], strict=True):
        if leaf.requires_grad:
            (actual,) = torch.autograd.grad(loss, leaf, torch.tensor(-2.0))
            assert torch.equal(actual, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_gradient_may_go_over_the_prediction(dtype, per):
    places = []

    def over_prediction(prediction, *rest, **options):
        computed = prediction * 1
        computed.register_hook(lambda grad: places.append((grad.data_ptr(), computed.data_ptr())))
        return score_loss(computed, *rest, **options, inplace=True)

    t, mask = tensors((3, 40), per, dtype), torch.rand(3, 40) > 0.5
    expected = losses(score_loss, t, DRAW, mask=mask)
    assert all(map(torch.equal, losses(over_prediction, t, DRAW, mask=mask), expected))
    ((gradient, prediction),) = places
    assert gradient == prediction


@pytest.mark.parametrize("required", [False, True])
def test_without_a_gradient_nothing_is_written(required):
    t = tensors((3, 9))
    computed = t.prediction.requires_grad_(required) + 0
    with torch.set_grad_enabled(not required):
        score_loss(computed, *t[1:], DRAW, inplace=True)
    assert torch.equal(computed, t.prediction)


# a graph that is kept is not scaled in place, which would tell as well
@pytest.mark.parametrize("kept", [False, True])
def test_a_prediction_to_write_over_is_computed_and_nobody_has_saved_it(kept):
    t = tensors((3, 9))
    loss, _ = score_loss(t.prediction.requires_grad_().tanh(), *t[1:], DRAW, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=kept)
    with pytest.raises(ValueError, match="prediction must be computed, got a leaf"):
        score_loss(t.prediction, *t[1:], DRAW, inplace=True)
