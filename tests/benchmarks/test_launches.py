from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.allocator import target_named
from dbkernels.ops import adaln_norm, attention, linear
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer.gradients import cast

F32, BF16 = torch.float32, torch.bfloat16
DIT_XL = (64, 256, 1152, 16, 4608)
VIT = (128, 65, 128, 4, 3072)


@pytest.fixture
def launched(bench):
    """How many kernels a function launches, given fake tensors of some shapes."""

    def count(function, *shapes, dtype=F32, grad=False):
        counter = bench("launches").Launches()
        with FakeTensorMode(), dry_run_on_gpu(132):
            tensors = [torch.empty(shape, dtype=dtype, requires_grad=grad) for shape in shapes]
            with counter:
                function(*tensors)
        return counter.total

    return count


FEW = [(2, 3)]
NOTHING = [  # views, and new memory
    lambda x: x.view(6),
    lambda x: x.T,
    lambda x: x[0].expand(4, 3).unsqueeze(0).transpose(1, 2),
    lambda x: x.chunk(3, dim=-1),
    lambda x: x.detach(),
    torch.empty_like,
    lambda x: x.new_empty(7),
    lambda x: (x.device, x.shape, x.to(F32)),
]
ONE = [
    lambda x: x + 1,
    lambda x: x.mul_(2),
    lambda x: x.to(BF16),
    lambda x: x.clone(),
    lambda x: x.sum(0),
    lambda x: x.mean(),
    lambda x: x @ x.T,
    lambda x: x.new_zeros(3),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.layer_norm(x, (3,)),
]
JOINED = [
    (lambda *t: torch.cat(t), FEW * 3, 1),
    (lambda *t: torch.cat(t), FEW * 129, 2),
    (lambda *t: torch.cat([x.T for x in t]), FEW * 65, 2),
    (lambda *t: torch.cat(t), [(1,) * 5] * 3, 3),
    (lambda *t: torch.stack(t, 2), [(1,) * 4] * 3, 1),
    (lambda *t: torch.stack(t, -1), [(1,) * 4] * 3, 3),
]
BIASES = [  # added by the matmul if it is a dense vector
    (torch.addmm, [(6,), (8, 4), (4, 6)], 1),
    (lambda b, x, w: torch.addmm(b[::2], x, w), [(12,), (8, 4), (4, 6)], 2),
    (torch.addmm, [(8, 6), (8, 4), (4, 6)], 2),
    (lambda total, x, w: total.addmm_(x, w), [(8, 6), (8, 4), (4, 6)], 1),
]
COPIED = [  # at once where dtypes and dense strides are alike, else one by one
    (lambda a, b, x, y: torch._foreach_copy_([a, b], [x, y]), FEW * 4, 1),
    (lambda a, b, x, y: torch._foreach_copy_([a.T, b.T], [x, y]), [(3, 2)] * 2 + FEW * 2, 2),
    (lambda a, x: torch._foreach_copy_([a[::2]] * 2, [x[::2]] * 2), [(9,)] * 2, 2),
    # and the cast that makes them differ
    (lambda a, b, x, y: torch._foreach_copy_([a, b], [x, y.to(BF16)]), FEW * 4, 2 + 1),
]
KERNELS = [(function, FEW, 0) for function in NOTHING] + [(function, FEW, 1) for function in ONE]


@pytest.mark.parametrize(("function", "shapes", "expected"), KERNELS + JOINED + BIASES + COPIED)
def test_an_op_of_torch_launches_its_kernels(launched, function, shapes, expected):
    assert launched(function, *shapes) == expected


CHUNK = 65536


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(3, 5), (4,)], 1),
        ([(0,), (4,)], 1),
        ([(1,)] * 64, 1),
        ([(1,)] * 65, 2),
        ([(320 * CHUNK,)], 1),
        ([(320 * CHUNK + 1,)], 2),
        # a tensor that is cut between two launches takes a place in both
        ([(319 * CHUNK,), (2 * CHUNK,), *[(1,)] * 63], 2),
        ([(319 * CHUNK,), (2 * CHUNK,), *[(1,)] * 64], 3),
    ],
)
def test_a_cast_of_many_tensors_launches_what_its_chunks_fill(launched, shapes, expected):
    assert launched(lambda *tensors: cast(tensors, BF16), *shapes) == expected


def test_a_multi_tensor_op_without_a_rule_is_refused(launched):
    with pytest.raises(ValueError, match="launches of aten::_foreach_add"):
        launched(lambda x: torch._foreach_add([x], 1), (2,))


@pytest.fixture
def both(launched):
    """How many kernels a function and its backward launch."""

    def run(function, *shapes, **more):
        def forward_and_backward(*tensors):
            y = function(*tensors)
            torch.autograd.grad(y, tensors, torch.empty_like(y))

        forward = launched(function, *shapes, grad=True, **more)
        return forward, launched(forward_and_backward, *shapes, grad=True, **more) - forward

    return run


def bfloat16_linear(x, weight, bias):
    with torch.autocast("cpu", BF16):
        return linear(x, weight, bias)


@pytest.mark.parametrize(
    ("function", "shapes", "dtype", "expected"),
    [
        # a view, and then zeros and a copy into them
        (lambda x: x[0], FEW, F32, (0, 2)),
        (lambda x: x[:1], FEW, F32, (0, 2)),
        (attention, [(2, 5, 3, 8)] * 3, BF16, (1, 3)),
        (attention, [(2, 5, 3, 8)] * 3, F32, (1, 4)),
        # programs share a sample of many tokens; one with a condition for each token is nobody's
        (adaln_norm, [(2, 64, 32), (2, 32), (2, 32)], F32, (1, 2)),
        (adaln_norm, [(128, 1, 32), (128, 32), (128, 32)], F32, (1, 1)),
        # a condition's projection: a cast and the matmul; then a cast, two matmuls and a sum
        (bfloat16_linear, [(8, 7), (4, 7), (4,)], F32, (2, 4)),
    ],
)
def test_an_op_launches_its_kernels_forward_and_backward(both, function, shapes, dtype, expected):
    assert both(function, *shapes, dtype=dtype) == expected


def test_what_is_counted_is_what_eager_s_ops_say(bench):
    """Each op of eager's layer under autocast, by what it is for."""
    layer, found = bench("layer_case"), Counter()
    with FakeTensorMode(), dry_run_on_gpu(132):
        case = layer.LayerCase(2, 64, 32, 2, 128, "autocast")
        inputs = layer.make_inputs(case, torch.device("cpu"))
        step = layer.LayerStep(layer.Competitor("eager").function(2), inputs, True)
        with bench("launches").Launches() as counted:
            step.forward()
    for name, count in counted.by_op.items():
        found[name.removeprefix("aten::").partition(".")[0]] += count
    assert found == {
        "_to_copy": 4 * 2 + 2,  # weights and biases, and the input of either branch
        "native_layer_norm": 2,
        "add": 2 + 2 + 2,  # 1 + scale, shift, and the residual
        "mul": 2 + 2,  # scale and gate
        "addmm": 4,
        "gelu": 1,
        "_scaled_dot_product_flash_attention_for_cpu": 1,
    }


# of a layer


@pytest.fixture
def counted(bench):
    """Launches of a layer, forward and backward."""

    def count(sizes, dtype, impl, **variant):
        case = bench("layer_case").LayerCase(*sizes, dtype)
        player = bench("layer_case").Competitor(impl, **variant)
        return bench("launches").of_layer(case, player, target_named("h100"))

    return count


@pytest.mark.parametrize("sizes", [DIT_XL, VIT], ids=["DiT-XL/2", "ViT"])
def test_a_layer_launches_less_than_half_of_what_eager_does(counted, sizes):
    forward, backward = counted(sizes, "autocast", "fused", recompute="none")
    assert counted(sizes, "autocast", "eager") == (28, 56)  # at any size
    assert forward <= 22 and 2 * forward < 28 and backward <= 45 and 2 * backward < 56


def test_a_layer_s_launches_are_these(counted):
    # the cast, three norms and residuals, four matmuls, attention, gelu
    # the cast, four matmuls and as many for weights, three sums, four ops with sums of their own,
    # attention, and the concatenation of its gradients
    one = counted(DIT_XL, "autocast", "fused", recompute="none")
    assert one == (10, 1 + 8 + 3 + 2 * 4 + 3 + 1)
    # a batch twice as large is two chunks of the MLP: gelu between its two matmuls; and their two
    # sums over chunks, with gelu's own sum
    two = counted((128, *DIT_XL[1:]), "autocast", "fused", recompute="none")
    assert (two[0] - one[0], two[1] - one[1]) == (3, 3 + 2 + 2)
    # without autocast nothing is cast in the forward
    assert counted(DIT_XL, "bfloat16", "fused", recompute="none")[0] == one[0] - 1


def test_what_a_compiler_makes_is_not_counted(counted):
    assert counted(VIT, "float32", "compiled") == (None, None)
    assert counted(VIT, "float32", "compiled_budget", budget=0.5) == (None, None)


def test_a_checkpointed_layer_launches_its_forward_twice(counted):
    forward, backward = counted(VIT, "bfloat16", "checkpointed")
    eager = counted(VIT, "bfloat16", "eager")
    assert forward == eager[0] and eager[1] < backward <= eager[1] + forward


def test_the_counts_are_printed_without_timing_anything(bench, capsys):
    options = bench("layer").Options(
        B=2, T=5, dim=32, num_heads=2, dtype=("autocast",), launches=True, device="cpu"
    )
    assert list(options.tables(None)) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["eager", "28", "+", "56"]
    assert [line.split()[:2] for line in lines[1:3]] == [["fused", "none"], ["fused", "attention"]]
