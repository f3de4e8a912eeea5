from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import projection as module
from dbkernels.ops.layer.projection import Gradients, add_product, as_rows, chunks, project

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
WANTED = frozenset({"fc_weight", "fc_bias"})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_projects_the_last_dimension(biased, given):
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4) if biased else None
    out = torch.empty(10, 4) if given else None
    y = project(x, weight, bias, out=out)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    assert not given or y.data_ptr() == out.data_ptr()


def test_writes_a_part_of_a_larger_tensor_and_nothing_beside_it():
    x, weight, whole = torch.randn(2, 6), torch.randn(4, 6), torch.zeros(5, 4)
    project(x, weight, torch.ones(4), out=whole[1:3])
    torch.testing.assert_close(whole[1:3], x @ weight.T + 1)
    assert not whole[[0, 3, 4]].any()


def test_rows_are_tokens():
    x = torch.randn(2, 5, 6)
    assert torch.equal(as_rows(x)[7], x[1, 2]) and as_rows(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("rows", "size", "bounds"),
    [
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (2, 3, [(0, 2)]),
        (0, 3, [(0, 0)]),
    ],
)
def test_chunks_tile_the_rows(rows, size, bounds):
    assert [(part.start, part.stop) for part in chunks(rows, size)] == bounds


def test_gradients_are_those_of_a_linear_layer():
    x, dy = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    linear = torch.nn.Linear(6, 4)
    linear(x).backward(dy)
    gradients = Gradients(WANTED, torch.float32)
    gradients.add_projection("fc", dy, x)
    torch.testing.assert_close(gradients.sums["fc_weight"], linear.weight.grad)
    torch.testing.assert_close(gradients.sums["fc_bias"], linear.bias.grad)


@pytest.mark.parametrize("wanted", [set(), {"fc_weight"}, {"fc_bias"}])
def test_what_is_not_wanted_is_not_computed(wanted):
    gradients = Gradients(frozenset(wanted), torch.float32)
    gradients.add_projection("fc", torch.randn(5, 4), torch.randn(5, 6))
    assert set(gradients.sums) == wanted


@pytest.mark.parametrize(
    ("gpu", "parameters", "expected"),
    [(True, F32, F32), (True, BF16, BF16), (True, F64, BF16), (False, F32, BF16)],
    ids=str,
)
def test_a_gpu_gives_float32_parameters_gradients_that_were_never_rounded(
    gpu, parameters, expected
):
    gradients = Gradients(WANTED, parameters)
    with FakeTensorMode(), dry_run_on_gpu(132) if gpu else nullcontext():
        x, dy = torch.empty(5, 6, dtype=BF16), torch.empty(5, 4, dtype=BF16)
        gradients.add_projection("fc", dy, x)
    assert {t.dtype for t in gradients.sums.values()} == {expected}


@pytest.mark.parametrize("gpu", [False, True])
def test_parts_of_products_add_up_in_float32(gpu):
    gradients = Gradients(WANTED, BF16)
    with FakeTensorMode(), dry_run_on_gpu(132) if gpu else nullcontext():
        x, dy = torch.empty(5, 6, dtype=BF16), torch.empty(5, 4, dtype=BF16)
        for _ in range(2):
            gradients.add_weight("fc", dy, x, part=True)
    assert gradients.sums["fc_weight"].dtype == F32


def test_many_small_parts_in_bfloat16_are_not_lost():
    gradients = Gradients(WANTED, torch.float32)
    for part in (256.0, *[0.5] * 64):
        gradients.add("fc_bias", torch.full((3,), part, dtype=torch.bfloat16))
    assert gradients.sums["fc_bias"].dtype == torch.float32
    assert gradients.sums["fc_bias"].tolist() == [288.0] * 3


def test_one_part_keeps_its_dtype_and_is_not_copied():
    gradients, part = Gradients(WANTED, torch.float32), torch.randn(3).bfloat16()
    gradients.add("fc_bias", part)
    assert gradients.sums["fc_bias"] is part


def test_parts_in_float64_stay_so():
    gradients = Gradients(WANTED, torch.float32)
    for _ in range(2):
        gradients.add("fc_bias", torch.full((3,), 1 + 2.0**-40, dtype=torch.float64))
    assert gradients.sums["fc_bias"].tolist() == [2 + 2.0**-39] * 3


def test_parts_are_left_alone_from_the_second_on():
    gradients, parts = (
        Gradients(WANTED, torch.float32),
        [torch.ones(3).bfloat16() for _ in range(3)],
    )
    for part in parts:
        gradients.add("fc_bias", part)
    assert all(part.tolist() == [1.0] * 3 for part in parts)


def test_a_product_of_many_tokens_on_a_cpu_is_the_sum_of_its_chunks(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 3)
    left, right = torch.randn(4, 10).bfloat16(), torch.randn(10, 5).bfloat16()
    total = torch.ones(4, 5)
    add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left.float() @ right.float())


def test_a_product_is_not_rounded_to_its_operands_dtype():
    ones, small = torch.ones(1, 2).bfloat16(), torch.tensor([[1.0], [2.0**-12]]).bfloat16()
    total = torch.ones(1, 1)
    add_product(total, ones, small)
    assert total.item() == 2 + 2.0**-12
