"""Shares of points in the balls of others."""

import numpy as np
import pytest
import torch

from dbkernels.metrics import manifolds, precision_recall


def by_definition(made, real, neighbours):
    """Equations 1 to 3 of the paper, point by point."""

    def share(points, others):
        inside = 0
        for point in points:
            for i, centre in enumerate(others):
                rest = np.delete(others, i, axis=0)
                radius = np.sort(np.linalg.norm(rest - centre, axis=1))[neighbours - 1]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return share(made, real), share(real, made)


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_shares_are_those_of_the_paper_however_many_distances_are_held(
    neighbours, at_once, monkeypatch
):
    monkeypatch.setattr(manifolds, "MOST_DISTANCES", at_once)
    random = torch.Generator().manual_seed(0)
    made, real = (torch.randn(count, 6, generator=random) * s for count, s in ((30, 0.6), (41, 1)))
    expected = by_definition(made.double().numpy(), real.double().numpy(), neighbours)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(made, real, neighbours=neighbours) == expected


def test_what_is_all_alike_is_precise_and_recalls_little():
    real = torch.arange(20.0).view(-1, 1)
    alike = torch.tensor([[5.0], [5.1], [5.2], [5.3], [5.4]])
    assert precision_recall(alike, real) == (1.0, 0.05)
    assert precision_recall(real, alike) == (0.05, 1.0)
    assert precision_recall(alike + 100, real) == (0.0, 0.0)


def test_the_edge_of_a_ball_is_inside_of_it_and_neighbours_are_three():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # the ball of 0 ends at -3, that of 3 at 6
    made = torch.tensor([[-3.0], [-3.01], [6.0], [6.01]])
    assert precision_recall(made, real).precision == 0.5
    # points that are equal have balls of no size
    assert precision_recall(torch.full((4, 3), 0.1), torch.full((5, 3), 0.1)) == (1.0, 1.0)


def test_features_far_from_the_origin_are_told_apart():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 3, generator=random, dtype=torch.float64) for _ in range(2))
    assert precision_recall(x + 2**30, y + 2**30) == precision_recall(x, y)


@pytest.mark.parametrize(
    ("made", "real", "neighbours", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), 3, r"equal width, got \(5, 3\) and \(5, 4\)"),
        (torch.zeros(5), torch.zeros(5, 4), 3, r"two matrices of equal width, got \(5,\)"),
        (torch.zeros(5, 4), torch.zeros(5, 4, 1), 3, "two matrices of equal width"),
        (torch.zeros(3, 4), torch.zeros(5, 4), 3, "made must have more than 3 rows, got 3"),
        (torch.zeros(5, 4), torch.zeros(3, 4), 3, "real must have more than 3 rows, got 3"),
        (torch.zeros(5, 4), torch.zeros(5, 4), 0, "neighbours must be at least 1, got 0"),
        (torch.full((5, 4), torch.inf), torch.zeros(5, 4), 3, "made must be finite"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.nan), 3, "real must be finite"),
    ],
)
def test_refuses_features_that_cannot_be_compared(made, real, neighbours, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(made, real, neighbours=neighbours)
