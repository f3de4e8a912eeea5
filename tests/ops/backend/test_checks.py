"""What the checks refuse beside what each op shows of them."""

import pytest
import torch

from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.backend.tile import MAX_D


def test_only_plain_torch_takes_float64():
    x = torch.empty(1, dtype=torch.float64)
    with use_implementation("torch"):
        checks.check_floats(x=x, bias=None)
        assert checks.result_dtype(torch.float64, x) == torch.float64
    with use_implementation("triton"):
        with pytest.raises(ValueError, match=r"x must be one of float32, .*, got torch.float64"):
            checks.check_floats(x=x)
        with pytest.raises(
            ValueError, match=r"dtype must be one of float32, .*, got torch.float64"
        ):
            checks.result_dtype(torch.float64, x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 5), r"x and h must be \(B, T, D\), got \(2, 3, 4, 5\)"),
        ((2, 3, 0), "D must be 1 to 16384, got 0"),
        ((1, 1, MAX_D + 1), "D must be 1 to 16384, got 16385"),
    ],
)
def test_takes_tokens_up_to_the_widest_row(shape, message):
    checks.check_tokens(x=torch.empty(0, 3, MAX_D))
    with pytest.raises(ValueError, match=message):
        checks.check_tokens(x=torch.empty(shape), h=torch.empty(shape))


def slices(*shape):
    return torch.empty(*shape[:-1], 6 * shape[-1]).chunk(6, dim=-1)


def test_a_token_with_its_own_modulation_is_a_sample_and_no_modulation_is_copied():
    x = torch.randn(3, 2, 8).transpose(0, 1)
    per_sample, per_token = slices(2, 8)[1], slices(2, 3, 8)[1]
    for modulation, expected in ((per_sample, x), (per_token, x.reshape(6, 1, 8))):
        samples, rows = checks.as_samples(x, modulation), checks.as_rows(modulation)
        assert torch.equal(samples, expected) and samples.is_contiguous()
        assert rows.shape == (len(expected), 8) and rows.data_ptr() == modulation.data_ptr()
