import pytest
import torch

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.backend.tile import MAX_D


def test_knows_which_norm_subtracts_the_mean():
    assert checks.check_norm("layer") is True and checks.check_norm("rms") is False
    with pytest.raises(ValueError, match="norm must be one of layer, rms, got batch"):
        checks.check_norm("batch")


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_takes_the_dtypes_of_training(name, dtype):
    with use_implementation(name):
        checks.check_floats(x=torch.empty(1, dtype=dtype), bias=None, h=torch.empty(1))


def test_only_plain_torch_takes_float64():
    x = torch.empty(1, dtype=torch.float64)
    with use_implementation("torch"):
        checks.check_floats(x=x)
    message = "x must be one of float32, bfloat16, float16, got torch.float64"
    with use_implementation("triton"), pytest.raises(ValueError, match=message):
        checks.check_floats(x=x)


def test_names_the_tensor_whose_dtype_is_refused():
    message = "h must be one of float32, bfloat16, float16, .*got torch.int64"
    with pytest.raises(ValueError, match=message):
        checks.check_floats(x=torch.empty(1), h=torch.empty(1, dtype=torch.int64))


def test_a_result_has_the_dtype_that_was_asked_for_or_that_of_what_goes_in():
    x = torch.empty(1, dtype=torch.float16)
    assert checks.result_dtype(None, x) == torch.float16
    assert checks.result_dtype(torch.bfloat16, x) == torch.bfloat16
    message = "dtype must be one of float32, bfloat16, float16, got torch.float64"
    with use_implementation("triton"), pytest.raises(ValueError, match=message):
        checks.result_dtype(torch.float64, x)


def test_refuses_two_devices():
    message = "x and h must be on one device, got c.*, meta"
    with pytest.raises(ValueError, match=message):
        checks.check_floats(x=torch.empty(1), gate=None, h=torch.empty(1, device="meta"))


def test_takes_tokens_up_to_the_widest_row():
    checks.check_tokens(x=torch.empty(2, 3, 1), h=torch.empty(2, 3, 1))
    checks.check_tokens(x=torch.empty(0, 3, MAX_D))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3)], r"x must be \(B, T, D\), got \(2, 3\)"),
        ([(2, 3, 4, 5)], r"x must be \(B, T, D\), got \(2, 3, 4, 5\)"),
        ([(2, 3, 4), (2, 3, 5)], r"x and h must be \(B, T, D\), got .*\(2, 3, [45]\) and \(2, 3,"),
        ([(2, 3, 0)], "D must be 1 to 16384, got 0"),
        ([(1, 1, MAX_D + 1)], "D must be 1 to 16384, got 16385"),
    ],
)
def test_refuses_what_is_not_tokens(shapes, message):
    names = ("x", "h")[: len(shapes)]
    with pytest.raises(ValueError, match=message):
        checks.check_tokens(**dict(zip(names, map(torch.empty, shapes), strict=True)))


def slices(*shape):
    return torch.empty(*shape[:-1], 6 * shape[-1]).chunk(6, dim=-1)


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8)])
def test_takes_slices_of_a_modulation_per_sample_or_per_token(shape):
    gate, scale, shift, *_ = slices(*shape)
    checks.check_modulation(torch.empty(2, 3, 8), gate=gate, scale=scale, shift=shift)
    checks.check_modulation(torch.empty(2, 3, 8), gate=gate)


ONE_TENSOR = "scale and shift must be slices of one modulation tensor: equal dtypes, equal strides"


@pytest.mark.parametrize(
    ("scale", "shift", "message"),
    [
        (slices(3, 8)[0], slices(3, 8)[1], r"must be \(B, D\) = \(2, 8\) or .*got \(3, 8\)"),
        (slices(2, 1, 8)[0], slices(2, 1, 8)[1], r"\(2, 3, 8\), got \(2, 1, 8\)"),
        (slices(2, 8)[0], slices(2, 3, 8)[1], r"got \(2, 3, 8\) and \(2, 8\)"),
        (slices(2, 8)[0], torch.empty(2, 8), ONE_TENSOR + r".*\(48, 1\) and torch.* \(8, 1\)"),
        (slices(2, 8)[0], slices(2, 8)[0].half(), ONE_TENSOR),
        (torch.empty(8, 2).T, torch.empty(8, 2).T, ONE_TENSOR + ", the last 1"),
    ],
)
def test_refuses_a_modulation_that_a_kernel_cannot_address(scale, shift, message):
    with pytest.raises(ValueError, match=message):
        checks.check_modulation(torch.empty(2, 3, 8), scale=scale, shift=shift)


def test_a_token_with_its_own_modulation_is_a_sample():
    x = torch.randn(3, 2, 8).transpose(0, 1)
    per_sample, per_token = slices(2, 8)[1], slices(2, 3, 8)[1]
    assert torch.equal(checks.as_samples(x, per_sample), x)
    assert torch.equal(checks.as_samples(x, per_token), x.reshape(6, 1, 8))
    assert checks.as_samples(x, per_sample).is_contiguous()
    assert checks.as_rows(per_sample).shape == (2, 8)
    assert checks.as_rows(per_token).shape == (6, 8)


def test_a_modulation_is_never_copied():
    for modulation in (slices(2, 8)[1], slices(2, 3, 8)[1]):
        assert checks.as_rows(modulation).data_ptr() == modulation.data_ptr()


def test_refuses_a_gradient_that_would_be_differentiated():
    message = "adaln_norm has no second derivative: call backward without create_graph=True"
    with pytest.raises(RuntimeError, match=message):
        checks.refuse_double_backward("adaln_norm")
    with torch.no_grad():
        checks.refuse_double_backward("adaln_norm")
