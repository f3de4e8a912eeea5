import pytest
import torch

from dbkernels.ops.backend import sums as sums_module
from dbkernels.ops.backend.sums import Segments, partial_sums


def test_parts_are_added_in_float32_and_rounded_once_into_slices():
    whole = torch.zeros(2, 6, dtype=torch.bfloat16)
    outs = whole[:, 1:3], whole[:, 4:6]
    # the second of three programs holds rows of both samples
    with partial_sums(Segments(T=6, rows=4, count=4), *outs) as sums:
        assert [(part.shape, part.dtype) for part in sums] == 2 * [((4, 2), torch.float32)]
        sums[0].copy_(torch.tensor([[1.0, 4.0], [2**-7, 5.0], [1.0, 2**-9], [2**-9, 1.0]]))
        sums[1].fill_(2.0)
    assert whole.tolist() == [[0, 1 + 2**-7, 9, 0, 4, 4], [0, 1, 1, 0, 4, 4]]


def test_small_parts_are_not_lost_in_a_large_one():
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    with partial_sums(Segments(T=5, rows=1, count=5), out) as (sums,):
        sums.copy_(torch.tensor([[1.0], [2**-9], [2**-9], [2**-9], [2**-9]]))
    # added in bfloat16 one by one, the sum would stay 1
    assert out.item() == 1 + 2**-7


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("outs", [1, 2, 3])
def test_any_number_of_parts_of_any_width_is_added(count, outs):
    D, parts = 130, torch.randn(outs, count, 130)
    totals = [torch.full((1, D), float("nan")) for _ in range(outs)]
    with partial_sums(Segments(T=3 * count - 1, rows=3, count=count), *totals) as sums:
        for part, values in zip(sums, parts, strict=True):
            part.copy_(values)
    for total, values in zip(totals, parts, strict=True):
        torch.testing.assert_close(total[0], values.sum(0))


def test_all_sums_of_a_kernel_take_one_launch(monkeypatch):
    grids, kernel = [], sums_module._sum_kernel

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(sums_module, "_sum_kernel", Counted())
    outs = [torch.empty(2, 300) for _ in range(3)]
    with partial_sums(Segments(T=8, rows=3, count=7), *outs) as sums:
        for part in sums:
            part.zero_()
    assert grids == [(2, 3)]
