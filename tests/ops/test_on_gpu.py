"""What an interpreter cannot show of kernels over rows: compiled code, real sizes, far offsets."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads

from dbkernels import ops
from dbkernels.ops import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("by_triton")]

BF16, F32 = torch.bfloat16, torch.float32
WIDTHS = [384, 768, 1152, 1536]  # of DiT's S, B, XL, and one that is a power of two times 3


class Rows:
    """Inputs of ops at one width: a stream, and modulation in slices as the model makes them."""

    def __init__(self, B, T, D, stream):
        self.D, self._shape, self._stream = D, (B, T), stream
        self._modulation = (0.5 * torch.randn(B, 6 * D)).to(BF16).chunk(6, dim=-1)

    def stream(self):
        return (torch.randn(*self._shape, self.D) + 3).to(self._stream)

    def branch(self, times=1):
        return (torch.randn(*self._shape, times * self.D) + 1).to(BF16)

    def bias(self, times):
        return torch.randn(times * self.D).to(BF16)

    def modulation(self, count):
        return self._modulation[:count]


def one(f):
    """f with its one output in a tuple."""
    return lambda *args: (f(*args),)


def together(f, *dtypes):
    """The outputs of f in one tensor, so that all have gradients; first in dtypes, where given."""

    def joined(*args):
        outputs = f(*args)
        if dtypes:
            outputs = [y.to(dtype) for y, dtype in zip(outputs, dtypes, strict=True)]
        return torch.cat([y.to(torch.promote_types(y.dtype, F32)) for y in outputs], dim=-1)

    return joined


def assert_accurate(name, op, specification, args, *dtypes):
    """All outputs, of these dtypes, and gradients; the specification rounds to them in eager."""
    actual = with_grads(together(op), *args)
    eager = with_grads(together(specification, *dtypes), *args)
    exact = with_grads(together(specification), *(a.double() for a in args))
    for i, results in enumerate(zip(actual, eager, exact, strict=True)):
        assert_as_accurate_as_eager(f"{name}, result {i}", *results)


# every pair of a width and a stream, each norm with either, and both at the width of DiT-XL: a GPU
# compiles some six kernels for each
NORMS = [
    *((D, BF16, norm) for D, norm in zip(WIDTHS, ["layer", "rms"] * 2, strict=True)),
    *((D, F32, norm) for D, norm in zip(WIDTHS, ["rms", "layer"] * 2, strict=True)),
    (1152, F32, "layer"),
]


@pytest.mark.parametrize("D, stream, norm", NORMS)
def test_norms_are_as_accurate_as_eager_at_real_widths(D, stream, norm, gpu, size):
    # the branches are bfloat16 whatever the stream is, as in autocast
    rows = Rows(*size((8, 256, D), (2, 5, 24)), stream)
    assert gpu.type == "cpu" or ops.implementation(gpu) == "triton"
    x, h, (gate, scale, shift) = rows.stream(), rows.branch(), rows.modulation(3)
    assert_accurate(
        "adaln_norm",
        one(partial(ops.adaln_norm, norm=norm, dtype=BF16)),
        one(partial(reference.adaln_norm, norm=norm)),
        (x, scale, shift),
        BF16,
    )
    assert_accurate(
        "gated_adaln_norm",
        partial(ops.gated_adaln_norm, norm=norm),
        partial(reference.gated_adaln_norm, norm=norm),
        (x, h, gate, scale, shift),
        stream,
        BF16,
    )


@pytest.mark.parametrize("stream", [BF16, F32], ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_the_residual_is_as_accurate_as_eager_at_real_widths(D, stream, size):
    rows = Rows(*size((8, 256, D), (2, 5, 24)), stream)
    args = rows.stream(), rows.branch(), *rows.modulation(1)
    assert_accurate(
        "gated_residual", one(ops.gated_residual), one(reference.gated_residual), args, stream
    )


@pytest.mark.parametrize("D", WIDTHS)
def test_activations_are_as_accurate_as_eager_at_real_widths(D, size):
    rows = Rows(*size((4, 256, D), (2, 5, 24)), BF16)
    args = rows.branch(4), rows.bias(4)
    assert_accurate("gelu", one(ops.gelu), one(reference.gelu), args, BF16)
    assert_accurate("swiglu", one(ops.swiglu), one(reference.swiglu), args, BF16)


@pytest.mark.needs_gpu("4 GiB in one tensor")
def test_rows_past_two_to_the_31_elements():
    count, D = 2**21 + 8, 1024
    x = torch.zeros(count, 1, D, dtype=BF16)
    scale, shift = torch.zeros(2, count, D, dtype=BF16)
    x[-1] = (torch.randn(D) + 3).to(BF16)
    y = ops.adaln_norm(x, scale, shift)
    assert torch.equal(y[-1], ops.adaln_norm(x[-1:], scale[-1:], shift[-1:])[0])
    assert not y[0].any()
