"""How much of what was made looks real, and how much of what is real was made.

    manifold(Y)     = the balls around each y of Y that reach its k-th nearest other of Y
    precision(X, Y) = share of the made X that are in manifold(Y)
    recall(X, Y)    = share of the real Y that are in manifold(X)

Kynkäänniemi et al. 2019 (arXiv:1904.06991), equations 1 to 3.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.settings import check_number

MOST_DISTANCES = 2**22  # at a time; in float64 they are 32 MiB


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    precision:  of what was made, what is among the real: quality
    recall:     of what is real, what is among the made: variety
    """

    precision: float
    recall: float


def precision_recall(made: Tensor, real: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Quality and variety of what was made, in features that are given.

    Both depend on how many there are: compare numbers of sets of the same sizes alone.

    Args:
        made:        (N, K)  features of what was made, floating-point and finite
        real:        (M, K)  of what is real
        neighbours:  k, of a ball; fewer than N and than M
    Raises:
        ValueError: the features are no two finite matrices of equal width, or have too few rows.
    """
    a, b = made.detach().double(), real.detach().double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "made and real must be two matrices of equal width, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    check_number("neighbours", neighbours, 1)
    for name, each in (("made", a), ("real", b)):
        if len(each) <= neighbours:
            raise ValueError(f"{name} must have more than {neighbours} rows, got {len(each)}")
        if not each.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return PrecisionRecall(_share(a, b, neighbours), _share(b, a, neighbours))


def _share(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of the points that are in a ball of the manifold."""
    # the nearest of all is the point itself, at no distance
    radii = torch.cat(
        [d.kthvalue(neighbours + 1, dim=1).values for d in _distances(manifold, manifold)]
    )
    return sum(int((d <= radii).any(1).sum()) for d in _distances(points, manifold)) / len(points)


def _distances(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Distances (n, M) float64 of some rows of the first after the others to all of the second."""
    for rows in first.split(max(1, MOST_DISTANCES // len(second))):
        # not by a product of matrices, whose rounding would put a ball's edge outside of it
        yield torch.cdist(rows, second, compute_mode="donot_use_mm_for_euclid_dist")
