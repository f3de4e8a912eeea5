import numpy as np
import pytest
import scipy.linalg
import torch

from dbkernels.metrics import frechet_distance


@pytest.mark.parametrize("width", [1, 4])
def test_features_are_as_far_as_a_matrix_root_says(width):
    first, second = (
        torch.randn(count, width).double() @ torch.randn(width, width).double() + mean
        for count, mean in ((50, 0), (70, 1))
    )
    a, b = (np.cov(each, rowvar=False).reshape(width, width) for each in (first, second))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = float((first.mean(0) - second.mean(0)).square().sum())
    expected += np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)


@pytest.mark.parametrize("count", [3, 100])
def test_equal_features_are_at_no_distance_and_a_move_costs_its_square(count):
    x = torch.randn(count, 8)  # three rows of eight leave a covariance of rank two
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    move = torch.zeros(8)
    move[2] = 3
    assert frechet_distance(x, x + move) == pytest.approx(9, abs=1e-4)
    assert frechet_distance(x.clone().requires_grad_(), x + move) == pytest.approx(9, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [((5, 3), (5, 4)), ((5, 3), (1, 3)), ((1, 3), (5, 3)), ((5,), (5, 3)), ((5, 3), (5, 3, 1))],
)
def test_rejects_features_that_cannot_be_compared(first, second):
    with pytest.raises(ValueError, match="matrices of equal width with at least 2 rows, got"):
        frechet_distance(torch.zeros(first), torch.zeros(second))
