import pytest
import torch
import triton
import triton.language as tl

# ties to even both ways, just under and over a tie, a carry into the exponent, the largest float32
ROUNDED = [
    *(1 - 2.0**-10, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-8 - 2.0**-20),
    *(-1 - 3 * 2.0**-8, 2 - 2.0**-12, 3.4e38, -3.4e38, 1e-40, -1e-40, 0.0, -0.0),
]
SPECIAL = [float("inf"), float("-inf"), float("nan")]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols).to(y_ptr.dtype.element_ty))


def copied(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    _copy_kernel[(1,)](x, y, len(x))
    return y


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32], ids=str)
def test_float32_is_stored_as_torch_rounds_it(target):
    x = torch.tensor(ROUNDED + SPECIAL)
    y = copied(x, target)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y[:-1].signbit(), x[:-1].signbit())  # the sign of a NaN means nothing


def test_bfloat16_is_loaded_exactly():
    x = torch.tensor(ROUNDED + SPECIAL).to(torch.bfloat16)
    torch.testing.assert_close(copied(x, torch.float32), x.float(), rtol=0, atol=0, equal_nan=True)
