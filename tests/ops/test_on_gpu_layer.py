"""The whole layer and its attention on a GPU, against float64."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from captured import capture, warm_up
from ops.one_layer import EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits
from ops.row_ops import ATTENTION, ROW_OPS_BY_NAME

from dbkernels.ops import reference

pytestmark = pytest.mark.gpu

BF16, F32 = torch.bfloat16, torch.float32
PLAIN, MIXED = (BF16,) * 3, (F32, BF16, BF16)  # dtypes of the stream, the modulation, the weights
ROTARY = ROW_OPS_BY_NAME["qk_norm_rotary"]
# T, heads, their width; one token alone has gradients of 0 for queries and keys, which a kernel
# that rounds two sums apart misses by more than eager: the layers below have such a case
HEADS = [(77, 12, 32), (256, 12, 64), (256, 16, 72), (1024, 12, 128)]


def cut(shape, size):
    """T, heads and their width; where it is rehearsed, of a layer that takes no time."""
    T, H, d = shape
    return size((T, H, d), (min(T, 5), 2, 8))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(ATTENTION, BF16), (ROTARY, BF16), (ROTARY, F32)],
    ids=["attention", "rotary-bfloat16", "rotary-float32"],
)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.usefixtures("by_triton")
def test_heads_are_as_accurate_as_eager(shape, op, dtype, size):
    args, options = op.inputs((2, *cut(shape, size)), dtype)
    fused, specification = (partial(f, **options) for f in (op.fused, op.specification))
    results = [with_grads(f, *args) for f in (fused, specification)]
    results.append(with_grads(specification, *(a.double() for a in args)))
    if op is ROTARY:
        # of so few elements as those of a norm's weight the largest error is a fluke
        results = [(*result[:-2], torch.cat(result[-2:])) for result in results]
    for i, each in enumerate(zip(*results, strict=True)):
        assert_as_accurate_as_eager(f"result {i}", *each)


# every pair of a policy, a head width, a length, an activation, a norm and a stream that matters
LAYERS = [
    # recompute, (T, heads, width), tokens, mlp, norm, dtypes, qk_norm
    ("none", (256, 16, 72), None, "gelu", "layer", MIXED, False),
    ("none", (77, 12, 32), 1, "swiglu", "rms", PLAIN, True),
    ("attention", (1024, 12, 64), None, "swiglu", "rms", MIXED, True),
    ("mlp", (256, 12, 128), None, "gelu", "layer", PLAIN, True),
    ("mlp", (1, 16, 72), None, "swiglu", "rms", MIXED, False),
    ("qkv", (77, 16, 72), 1, "gelu", "layer", MIXED, True),
    ("qkv", (1024, 12, 32), None, "gelu", "layer", PLAIN, False),
    ("layer", (256, 12, 64), 77, "gelu", "layer", PLAIN, True),
    ("layer", (77, 12, 128), None, "swiglu", "layer", MIXED, False),
    ("layer_narrow", (256, 16, 72), None, "gelu", "rms", MIXED, True),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_layer_is_as_accurate_as_eager_at_each_policy(case, size):
    recompute, shape, num_queries, mlp, norm, dtypes, qk_norm = case
    T, H, d = cut(shape, size)
    layer = OneLayer(
        2, T, H * d, H, hidden=2 * H * d, mlp=mlp, norm=norm, qk_norm=qk_norm, rotated=qk_norm,
        dtypes=dtypes,
    )  # fmt: skip
    num_queries = num_queries and min(num_queries, T)
    result = layer.with_grads(recompute=recompute, num_queries=num_queries)
    assert result["out"].shape == (2, num_queries or T, H * d)
    layer.assert_as_accurate_as_eager(result, num_queries=num_queries)


def test_a_layer_is_as_accurate_as_eager_under_autocast(gpu, size):
    T, H, d = cut((256, 16, 72), size)
    layer = OneLayer(2, T, H * d, H, hidden=4 * H * d)
    with torch.autocast(gpu.type, BF16):
        result = layer.with_grads(recompute="qkv")
        eager = layer.with_grads(reference.adaln_layer)
    assert result["out"].dtype == F32
    layer.compare([result], eager)


@pytest.mark.parametrize("dtypes", [PLAIN, MIXED], ids=["bfloat16", "mixed"])
@pytest.mark.parametrize(
    ("mlp", "keeps"),
    # without its pre-activation, GELU may be taken of what was not rounded yet
    [("gelu", ["attention"]), ("swiglu", SAME_BITS[1:])],
    ids=["gelu", "swiglu"],
)
def test_policies_give_the_same_bits(mlp, keeps, dtypes, size):
    T, H, d = cut((77, 16, 72), size)
    layer = OneLayer(2, T, H * d, H, hidden=4 * H * d, mlp=mlp, dtypes=dtypes)
    expected = layer.with_grads(recompute="none")
    for recompute in keeps:
        assert_same_bits(layer.with_grads(recompute=recompute), expected)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_a_captured_layer_replays_the_same_bits(recompute, gpu, size):
    layer = OneLayer(*size((2, 64, 384, 6), (1, 5, 16, 2)), hidden=size(1536, 24), dtypes=PLAIN)
    leaves = {name: tensor.requires_grad_() for name, tensor in layer.tensors.items()}

    def gradients():
        return torch.autograd.grad(
            layer.run(leaves, recompute=recompute).sum(), list(leaves.values())
        )

    # compiles the kernels, as a capture may not
    expected = warm_up(lambda: [gradients() for _ in range(2)][-1], gpu)
    expected = [gradient.clone() for gradient in expected]
    replay, captured = capture(gradients, gpu)
    replay()
    for actual, bits in zip(captured, expected, strict=True):
        assert torch.equal(actual, bits)
