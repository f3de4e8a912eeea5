from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.memory.allocator import target_named
from dbkernels.ops import adaln_norm, attention, linear
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer.projection import cast

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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(6),
        lambda x: x.T,
        lambda x: x[0].expand(4, 3).unsqueeze(0).transpose(1, 2),
        lambda x: x.chunk(3, dim=-1),
        lambda x: x.detach(),
        torch.empty_like,
        lambda x: x.new_empty(7),
        lambda x: (x.device, x.shape, x.to(F32)),
    ],
)
def test_views_and_new_memory_launch_nothing(launched, function):
    assert launched(function, (2, 3)) == 0


@pytest.mark.parametrize(
    "function",
    [
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
    ],
)
def test_an_op_of_torch_launches_one_kernel(launched, function):
    assert launched(function, (2, 3)) == 1


def test_a_bias_is_added_by_the_matmul_if_it_is_a_dense_vector(launched):
    x, w = (8, 4), (4, 6)
    assert launched(torch.addmm, (6,), x, w) == 1
    assert launched(lambda b, x, w: torch.addmm(b[::2], x, w), (12,), x, w) == 2
    assert launched(torch.addmm, (8, 6), x, w) == 2
    assert launched(lambda total, x, w: total.addmm_(x, w), (8, 6), x, w) == 1


def test_tensors_are_joined_by_one_launch_if_they_have_few_dimensions(launched):
    assert launched(lambda *t: torch.cat(t), *[(2, 3)] * 3) == 1
    assert launched(lambda *t: torch.cat(t), *[(2, 3)] * 129) == 2
    assert launched(lambda *t: torch.cat([x.T for x in t]), *[(2, 3)] * 65) == 2
    assert launched(lambda *t: torch.cat(t), *[(1,) * 5] * 3) == 3
    assert launched(lambda *t: torch.stack(t, 2), *[(1,) * 4] * 3) == 1
    assert launched(lambda *t: torch.stack(t, -1), *[(1,) * 4] * 3) == 3


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


@pytest.mark.parametrize(
    ("copies", "sources", "expected"),
    [
        (lambda: [torch.empty(2, 3)] * 2, lambda: [torch.empty(2, 3)] * 2, 1),
        (lambda: [torch.empty(2, 3)] * 2, lambda: [torch.empty(3, 2).T] * 2, 2),
        (lambda: [torch.empty(9)[::2]] * 2, lambda: [torch.empty(9)[::2]] * 2, 2),
        (lambda: [torch.empty(2)] * 2, lambda: [torch.empty(2), torch.empty(2).to(BF16)], 2),
    ],
)
def test_what_a_multi_tensor_copy_does_not_take_is_copied_one_by_one(
    launched, copies, sources, expected
):
    def copy():
        with torch.no_grad():
            pairs = copies(), sources()
        torch._foreach_copy_(*pairs)

    made = launched(lambda: (copies(), sources()))
    assert launched(copy) - made == expected


def test_a_multi_tensor_op_without_a_rule_is_refused(launched):
    with pytest.raises(ValueError, match="launches of aten::_foreach_add"):
        launched(lambda x: torch._foreach_add([x], 1), (2,))


def test_a_gradient_of_a_part_is_zeros_and_a_copy(launched):
    def backward(x):
        x[0].sum().backward()

    forward = launched(lambda x: x[0].sum(), (2, 3), grad=True)
    # and ones, as the gradient of the sum
    assert launched(backward, (2, 3), grad=True) == forward + 1 + 2


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, 3), (F32, 4)])
def test_attention_launches_one_kernel_and_several_backward(launched, dtype, expected):
    shapes = [(2, 5, 3, 8)] * 3
    forward = launched(lambda *qkv: attention(*qkv), *shapes, dtype=dtype, grad=True)
    assert forward == 1

    def both(q, k, v):
        y = attention(q, k, v)
        torch.autograd.grad(y, (q, k, v), torch.empty_like(y))

    assert launched(both, *shapes, dtype=dtype, grad=True) == 1 + expected


# programs share a sample of many tokens; one with a condition for each token is nobody else's
@pytest.mark.parametrize(("samples", "T", "expected"), [(2, 64, 2), (128, 1, 1)])
def test_an_op_of_ours_launches_one_more_where_programs_share_sums(launched, samples, T, expected):
    def both(x, scale, shift):
        y = adaln_norm(x, scale, shift)
        torch.autograd.grad(y, (x, scale, shift), torch.empty_like(y))

    shapes = [(samples, T, 32), (samples, 32), (samples, 32)]
    assert launched(both, *shapes, grad=True) == 1 + expected


def test_a_condition_s_projection_casts_at_once_and_rounds_nothing(launched):
    def forward(x, weight, bias):
        with torch.autocast("cpu", BF16):
            return linear(x, weight, bias)

    def both(x, weight, bias):
        y = forward(x, weight, bias)
        torch.autograd.grad(y, (x, weight, bias), torch.empty_like(y))

    shapes = (8, 7), (4, 7), (4,)
    # the cast and the matmul; then the cast, two matmuls and a sum
    assert launched(forward, *shapes, grad=True) == 2
    assert launched(both, *shapes, grad=True) == 2 + 4


def test_what_is_counted_is_what_eager_s_ops_say(bench):
    """Each op of eager's layer under autocast, by what it is for."""
    case = bench("layer_case").LayerCase(2, 64, 32, 2, 128, "autocast")
    player = bench("layer_case").Competitor("eager")
    with FakeTensorMode(), dry_run_on_gpu(132):
        inputs = bench("layer_case").make_inputs(case, torch.device("cpu"))
        step = bench("layer_case").LayerStep(player.function(case.num_heads), inputs, True)
        with bench("launches").Launches() as counter:
            step.forward()
    found = Counter()
    for name, count in counter.by_op.items():
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
    assert forward <= 22 and backward <= 45
    eager = counted(sizes, "autocast", "eager")
    assert eager == (28, 56)  # at any size
    assert 2 * forward < eager[0] and 2 * backward < eager[1]


def test_a_layer_s_launches_are_these(counted):
    # the cast, three norms and residuals, four matmuls, attention, gelu
    # the cast, four matmuls and as many for weights, three sums, four ops with sums of their own,
    # attention, and the concatenation of its gradients
    assert counted(DIT_XL, "autocast", "fused", recompute="none") == (10, 1 + 8 + 3 + 2 * 4 + 3 + 1)


def test_a_batch_twice_as_large_is_two_chunks_of_the_mlp(counted):
    one = counted(DIT_XL, "autocast", "fused", recompute="none")
    two = counted((128, *DIT_XL[1:]), "autocast", "fused", recompute="none")
    # gelu between its two matmuls; and their two sums over chunks, with gelu's own sum
    assert (two[0] - one[0], two[1] - one[1]) == (3, 3 + 2 + 2)


def test_without_autocast_nothing_is_cast_in_the_forward(counted):
    autocast = counted(DIT_XL, "autocast", "fused", recompute="none")
    assert counted(DIT_XL, "bfloat16", "fused", recompute="none")[0] == autocast[0] - 1


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
