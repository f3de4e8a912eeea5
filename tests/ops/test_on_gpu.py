"""What an interpreter cannot show of kernels over rows: compiled code, real sizes, far offsets."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_op_is_accurate
from ops.one_layer import OneLayer
from ops.row_ops import BF16, F32, ROW_OPS_BY_NAME, outputs_of

from dbkernels import ops
from dbkernels.ops import LayerWeights, reference
from dbkernels.ops.layer.passes import mlp

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("by_triton")]

WIDTHS = [384, 768, 1152, 1536]  # of DiT's S, B, XL, and one that is a power of two times 3
NORMS = [{"norm": "layer"}, {"norm": "rms"}]
# every pair of a width and a stream, each norm with either, and both at the width of DiT-XL: a GPU
# compiles some six kernels for each
NORM_CASES = [
    *((D, BF16, norm) for D, norm in zip(WIDTHS, NORMS * 2, strict=True)),
    *((D, F32, norm) for D, norm in zip(WIDTHS, NORMS[::-1] * 2, strict=True)),
    (1152, F32, NORMS[0]),
]
CASES = [
    *((name, *case) for name in ("adaln_norm", "gated_adaln_norm") for case in NORM_CASES),
    *(("gated_residual", D, stream, {}) for D in WIDTHS for stream in (BF16, F32)),
    *((name, 4 * D, BF16, {}) for name in ("gelu", "swiglu") for D in WIDTHS),
]


@pytest.mark.parametrize(("name", "D", "stream", "options"), CASES)
def test_rows_are_as_accurate_as_eager_at_real_widths(name, D, stream, options, gpu, size):
    assert gpu.type == "cpu" or ops.implementation(gpu) == "triton"
    op, shape = ROW_OPS_BY_NAME[name], size((8, 256, D), (2, 5, 24))
    # the branches are bfloat16 whatever the stream is, as in autocast
    args, _ = op.inputs(shape, BF16, offset=3.0)
    args[0] = op.inputs(shape, stream, offset=3.0)[0][0]
    fused, specification = (partial(f, **options) for f in (op.fused, op.specification))
    if name == "adaln_norm":
        fused = partial(fused, dtype=BF16)
    dtypes = [y.dtype for y in outputs_of(fused, args)]

    def rounded(*args):
        outputs = outputs_of(specification, args)
        return tuple(y.to(dtype) for y, dtype in zip(outputs, dtypes, strict=True))

    assert_op_is_accurate(fused, rounded, args, where=name, exact=specification)


@pytest.mark.needs_gpu("4 GiB in one tensor")
def test_rows_past_two_to_the_31_elements():
    count, D = 2**21 + 8, 1024
    x = torch.zeros(count, 1, D, dtype=BF16)
    scale, shift = torch.zeros(2, count, D, dtype=BF16)
    x[-1] = (torch.randn(D) + 3).to(BF16)
    y = ops.adaln_norm(x, scale, shift)
    assert torch.equal(y[-1], ops.adaln_norm(x[-1:], scale[-1:], shift[-1:])[0])
    assert not y[0].any()


def in_eager(y, w):
    h = torch.nn.functional.linear(y, w.fc1_weight, w.fc1_bias)
    return torch.nn.functional.linear(reference.gelu(h), w.fc2_weight, w.fc2_bias)


# GELU in the epilogue of fc1: only a GPU's matmul has its tanh form
@pytest.mark.parametrize(
    "shape", [(2, 256, 1152), (3, 77, 384), (1, 1, 64), (128, 256, 384)], ids=str
)
def test_a_branch_that_keeps_no_pre_activation_is_as_accurate_as_eager(shape, size):
    B, T, D = size(shape, (2, 5, 32))
    w = OneLayer(1, 1, D, 1, hidden=4 * D, qk_norm=False, dtypes=(BF16,) * 3).weights
    y = (torch.randn(B, T, D) + 1).to(BF16)
    exact = in_eager(y.double(), LayerWeights(*(None if t is None else t.double() for t in w)))
    actual = mlp(y, "gelu", w, hidden=None)
    assert_as_accurate_as_eager("m", actual, in_eager(y, w), exact)
