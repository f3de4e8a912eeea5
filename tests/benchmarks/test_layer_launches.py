import pytest
import torch

DIT_XL = (64, 256, 1152, 16, 4608)
VIT = (128, 65, 128, 4, 3072)
# of eager's layer under autocast, at any size
EAGER = (28, 56)


@pytest.fixture
def counted(bench):
    """Launches of a layer, forward and backward."""

    def count(sizes, dtype, impl, **variant):
        case = bench("layer_case").LayerCase(*sizes, dtype)
        player = bench("layer_case").Competitor(impl, **variant)
        module = bench("layer_launches")
        found = module.count(case, player, module.target_for(torch.device("cpu")))
        return found.launches_forward, found.launches_backward

    return count


@pytest.mark.parametrize("sizes", [DIT_XL, VIT], ids=["DiT-XL/2", "ViT"])
def test_a_layer_launches_less_than_half_of_what_eager_does(counted, sizes):
    forward, backward = counted(sizes, "autocast", "fused", recompute="none")
    assert forward <= 22 and backward <= 45
    eager = counted(sizes, "autocast", "eager")
    assert eager == EAGER
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
    module = bench("layer_launches")
    module.main(module.Options(B=2, T=5, dim=32, num_heads=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["eager", "28", "+", "56"]
    assert [line.split()[:2] for line in lines[2:4]] == [["fused", "none"], ["fused", "attention"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"B": 0}, "B must be at least 1, got 0"),
        ({"dim": 30, "num_heads": 4}, "num_heads must divide dim = 30, got 4"),
        ({"dtype": "float8"}, "dtype must be one of float32, .*, got float8"),
        ({"target": "v100"}, "v100"),
    ],
)
def test_options_that_name_no_layer_are_refused(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("layer_launches").Options(**options)
