"""What an interpreter cannot show: compiled code, real sizes, far offsets and captured graphs."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_op_is_accurate, with_grads
from captured import capture, warm_up
from ops.logits import assert_gradient_accurate, assert_loss_accurate
from ops.one_layer import EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits
from ops.row_ops import ATTENTION, BF16, F32, ROW_OPS_BY_NAME, TWO_STREAM, outputs_of

from dbkernels import ops
from dbkernels.ops import reference
from dbkernels.ops.layer.mlp import mlp

pytestmark = pytest.mark.gpu
by_triton = pytest.mark.usefixtures("by_triton")

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


@by_triton
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
@by_triton
@pytest.mark.parametrize(
    "shape", [(2, 256, 1152), (3, 77, 384), (1, 1, 64), (128, 256, 384)], ids=str
)
def test_a_branch_that_keeps_no_pre_activation_is_as_accurate_as_eager(shape, size):
    B, T, D = size(shape, (2, 5, 32))
    w = OneLayer(1, 1, D, 1, hidden=4 * D, qk_norm=False, dtypes=(BF16,) * 3).weights
    y = (torch.randn(B, T, D) + 1).to(BF16)
    wide = w.with_tensors([t if t is None else t.double() for t in w.tensors()])
    exact = in_eager(y.double(), wide)
    actual = mlp(y, "gelu", w.fc1, w.fc2, hidden=None)
    assert_as_accurate_as_eager("m", actual, in_eager(y, w), exact)


# the whole layer and its attention

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
    ("op", "dtype", "variant"),
    [
        (ATTENTION, BF16, {}),
        (ATTENTION, BF16, {"causal": True}),
        # float32 goes by a kernel that pads its logsumexp
        (ATTENTION, F32, {"causal": True}),
        (TWO_STREAM, BF16, {}),
        (TWO_STREAM, F32, {}),
        (ROTARY, BF16, {}),
        (ROTARY, F32, {}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@by_triton
def test_heads_are_as_accurate_as_eager(shape, op, dtype, variant, size):
    args, options = op.inputs((2, *cut(shape, size)), dtype, **variant)
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
STREAMS = [
    # recompute, (T, heads, width), num_samples, dtypes, qk_norm: the gradient of its few weights is
    # a fluke in bfloat16, where a noisy query's has two parts that are rounded apart
    ("none", (256, 12, 64), None, PLAIN, False),
    ("none", (77, 12, 64), 2, MIXED, False),
    ("qkv", (256, 16, 72), 2, MIXED, False),
    ("layer", (1024, 12, 64), 2, (F32,) * 3, True),
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


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_layer_of_two_streams_is_as_accurate_as_eager(case, size):
    recompute, shape, num_samples, dtypes, qk_norm = case
    T, H, d = cut(shape, size)
    options = {"hidden": 2 * H * d, "mlp": "swiglu", "norm": "rms", "rotated": True}
    layer = OneLayer(4, T, H * d, H, **options, qk_norm=qk_norm, dtypes=dtypes)
    told = {"attention": "two_stream", "num_samples": num_samples}
    result = layer.with_grads(recompute=recompute, **told)
    assert result["out"].shape == (num_samples or 4, T, H * d)
    layer.assert_as_accurate_as_eager(result, **told)


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


# losses, noise and random numbers


@pytest.mark.parametrize("V", [1000, 50257])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@by_triton
def test_the_gradient_of_softmax_is_as_accurate_as_eager(dtype, V, size):
    assert_gradient_accurate(*size((2048, V), (5, V % 97)), dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@by_triton
def test_cross_entropy_is_as_accurate_as_eager(dtype, reduction, size):
    N, V, D = size((2048, 32000, 768), (9, 70, 12))
    args = 2 + torch.randn(N, D), torch.randn(V, D) / D**0.5, torch.randn(V)
    target, weight = torch.randint(0, V, (N,)), 0.5 + torch.rand(N)
    target[1] = -100
    assert_loss_accurate([t.to(dtype) for t in args], target, weight, reduction=reduction)


@pytest.mark.parametrize("unit", [False, True], ids=["plain", "unit"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@by_triton
def test_rows_of_a_table_are_as_accurate_as_eager_and_their_gradient_can_be_captured(
    dtype, unit, gpu, size
):
    N, V, D = size((16384, 50257, 768), (70, 30, 12))
    # about as Zipf's law has words: one in 16 is the first
    table, index = (torch.randn(V, D) + 0.5).to(dtype), (V ** torch.rand(N)).long() - 1
    calls = (partial(f.table_rows, index=index, unit=unit) for f in (ops, reference))
    assert_op_is_accurate(*calls, [table])
    leaf, dy = table.requires_grad_(), torch.randn(N, D).to(dtype)

    def gradient():
        return torch.autograd.grad(ops.table_rows(leaf, index, unit=unit), leaf, dy)

    (expected,) = (bits.clone() for bits in warm_up(gradient, gpu))
    replay, captured = capture(gradient, gpu)
    replay()
    assert torch.equal(captured[0], expected)


def noise_case(dtype, dims=1):
    """A target, coefficients and a prediction of an odd size, and a draw near its limits."""
    shape = (5, 3, 1001)
    z0, prediction = ((0.5 * torch.randn(shape)).to(dtype) for _ in range(2))
    a, b = 4 * torch.randn(2, *shape[:dims])
    return z0, a, b, prediction, ops.Draw(seed=2**64 - 3, step=2**40 + 5, sample=2**32 - 5)


def noise_implementations(device):
    compiled = ops.implementation(device, "add_noise_fwd")
    return ["triton", *({compiled} - {"triton"})]


def test_a_gpu_draws_the_numbers_of_a_cpu(gpu):
    *_, draw = noise_case(BF16)
    with ops.use_implementation("torch"):
        expected = ops.normals(draw, 5, 3003, "cpu"), ops.uniforms(draw, 5, 77, device="cpu")
    for name in noise_implementations(gpu):
        with ops.use_implementation(name):
            actual = ops.normals(draw, 5, 3003, gpu).cpu()
            uniform = ops.uniforms(draw, 5, 77, device=gpu).cpu()
        torch.testing.assert_close(actual, expected[0], rtol=0, atol=1e-6)
        assert torch.equal(uniform, expected[1])


def test_a_captured_step_draws_anew_at_each_replay(gpu):
    z0, a, b, prediction, _ = noise_case(BF16)
    step = torch.tensor(3)

    def drawn(step):
        draw = ops.Draw(seed=7, step=step, sample=8)
        loss, losses = ops.score_loss(prediction, z0, a, b, draw)
        noisy, uniform = ops.add_noise(z0, a, b, draw), ops.uniforms(draw, 5, device=gpu)
        return noisy, loss, losses, ops.normals(draw, 5, 3003, gpu), uniform

    for name in noise_implementations(gpu):
        step.fill_(3)
        with ops.use_implementation(name):
            drawn(step)  # compiles the kernels, as a capture may not
            replay, captured = capture(partial(drawn, step), gpu)
            for value in (3, 4, 2**40 + 5):
                step.fill_(value)
                replay()
                for actual, expected in zip(captured, drawn(value), strict=True):
                    assert torch.equal(actual, expected), (name, value)


@pytest.mark.parametrize("dims", [1, 2])  # coefficients of samples, and of tokens
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_noise_and_loss_on_a_gpu_are_those_of_plain_torch(dtype, dims, gpu):
    z0, a, b, prediction, draw = noise_case(dtype, dims)
    options = {"weight": 0.5 + torch.rand(a.shape), "mask": torch.rand(5, 3) > 0.3}

    def by(name, z0, a, b, prediction, **options):
        leaves = prediction.detach().requires_grad_(), z0.detach().requires_grad_()
        with ops.use_implementation(name):
            noisy = ops.add_noise(z0, a, b, draw)
            loss, losses = ops.score_loss(*leaves, a, b, draw, **options)
            return noisy, losses, *torch.autograd.grad(loss, leaves)

    wide = (t.double() for t in (z0, prediction))
    wide = [next(wide).cpu(), a.cpu(), b.cpu(), next(wide).cpu()]
    exact = by("torch", *wide, **{name: t.cpu() for name, t in options.items()})
    for name in noise_implementations(gpu):
        for actual, expected in zip(by(name, z0, a, b, prediction, **options), exact, strict=True):
            error, eps = (actual.cpu().double() - expected).abs().max(), torch.finfo(dtype).eps
            assert error <= 2 * eps * expected.abs().max() + 1e-6, name
