import pytest
import torch

from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.affine import fold_affine

MODULATIONS = [(2, 40), (2, 5, 40)]


def inputs(*shape, dtype=torch.float64):
    """scale, shift, weight and bias, the last two far from what changes nothing."""
    scale, shift = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    return scale, shift, 3 + weight, bias - 2


@pytest.mark.parametrize("bias_given", [True, False])
@pytest.mark.parametrize("shape", MODULATIONS, ids=str)
def test_does_the_work_of_a_weight_and_a_bias(shape, bias_given):
    scale, shift, weight, bias = inputs(*shape)
    x_hat = torch.randn(2, 5, 40, dtype=torch.float64)
    over_tokens = reference.over_tokens
    affine = weight * x_hat + (bias if bias_given else 0)
    expected = (1 + over_tokens(scale)) * affine + over_tokens(shift)
    folded = fold_affine(scale, shift, weight, bias if bias_given else None)
    actual = (1 + over_tokens(folded[0])) * x_hat + over_tokens(folded[1])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_of_1_and_a_bias_of_0_change_nothing():
    scale, shift, weight, bias = inputs(2, 40)
    folded = fold_affine(scale, shift, torch.ones_like(weight), torch.zeros_like(bias))
    torch.testing.assert_close(folded, (scale, shift), rtol=0, atol=1e-15)


@pytest.mark.parametrize("given", [3, 4], ids=["without bias", "with bias"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)], ids=str)
def test_gradients_agree_with_differences(shape, given):
    args = [a.requires_grad_() for a in inputs(*shape)[:given]]
    assert torch.autograd.gradcheck(fold_affine, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_modulation_keeps_the_small_digits_of_the_weight(dtype):
    scale, shift, weight, bias = (a.float() for a in inputs(2, 40))
    scale, shift = scale.to(dtype), shift.to(dtype)
    folded = fold_affine(scale, shift, weight, bias)
    exact = fold_affine(scale.double(), shift.double(), weight.double(), bias.double())
    assert [f.dtype for f in folded] == [torch.float32, torch.float32]
    for actual, expected in zip(folded, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", MODULATIONS, ids=str)
def test_what_it_returns_goes_into_a_norm_and_its_gradient_comes_back(shape, norm):
    x = 3 + torch.randn(2, 5, 40)
    args = [a.float().requires_grad_() for a in inputs(*shape)]
    y = adaln_norm(x, *fold_affine(*args), norm=norm)

    doubles = [a.detach().double().requires_grad_() for a in args]
    scale, shift, weight, bias = doubles
    affine = weight * reference.normalise(x.double(), norm, 1e-6) + bias
    exact = (1 + reference.over_tokens(scale)) * affine + reference.over_tokens(shift)
    dy = torch.randn(2, 5, 40)
    actual = y, *torch.autograd.grad(y, args, dy)
    expected = exact, *torch.autograd.grad(exact, doubles, dy.double())
    for got, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)


def test_changes_none_of_its_arguments():
    args = inputs(2, 40)
    before = [a.clone() for a in args]
    fold_affine(*args)
    assert all(map(torch.equal, args, before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda scale, shift, weight, bias: (scale, shift[:1], weight, bias),
            r"scale and shift must have one shape, got \(2, 40\) and \(1, 40\)",
        ),
        (
            lambda scale, shift, weight, bias: (scale, shift, weight[:1], bias),
            r"weight must be \(D,\) = \(40,\), got \(1,\)",
        ),
        (
            lambda scale, shift, weight, bias: (scale, shift, weight, bias[None]),
            r"bias must be \(D,\) = \(40,\), got \(1, 40\)",
        ),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        fold_affine(*change(*inputs(2, 40)))
