"""How far two sets of features are from each other, as two normal distributions.

    |m1 - m2|**2 + tr(C1 + C2 - 2 (C1 C2)**(1/2))

Dowson & Landau 1982. Called FID only where the features are Inception's.
"""

import numpy as np
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Distance of two sets of features, each taken as a normal distribution.

    Args:
        first:   (N, K)  features, N at least 2
        second:  (M, K)
    Raises:
        ValueError: the features are no two matrices of equal width, or one has a single row.
    """
    a, b = (features.detach().double().cpu().numpy() for features in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "features must be two matrices of equal width with at least 2 rows, "
            f"got {a.shape} and {b.shape}"
        )
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # the product is similar to a positive matrix: its eigenvalues are real but for rounding
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0))
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)
