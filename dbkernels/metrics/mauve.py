"""How alike two sets of texts are, by the features of a language model (MAUVE).

Pillutla et al. 2021 (arXiv:2102.01454), by the authors' library.
"""

import numpy as np
from torch import Tensor

from dbkernels.metrics.needed import needed
from dbkernels.settings import check_number


def mauve_score(
    made: Tensor,
    real: Tensor,
    *,
    clusters: int | None = None,
    scaling_factor: float = 5.0,
    seed: int = 0,
) -> float:
    """MAUVE in (0, 1]; higher is more alike.

    Compare scores of the same model's features, the same numbers of texts, clusters and scaling
    factor alone: papers differ in each of them.

    Args:
        made:            (N, K)  features of texts that were made, floating-point and finite: the
                         paper takes GPT-2's last hidden state at the last token
        real:            (M, K)  of real ones
        clusters:        into which texts are sorted, at most N and M; None is a tenth of the fewer
                         texts, and at least 2
        scaling_factor:  c of the paper, above 0
        seed:            of the clusters
    Raises:
        ValueError: `mauve-text` is missing, or an argument has another shape or is out of range.
    """
    a, b = (each.detach().float().cpu().numpy() for each in (made, real))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"made and real must be two matrices of equal width, got {a.shape} and {b.shape}"
        )
    fewest = min(len(a), len(b))
    if fewest < 2:
        raise ValueError(f"made and real must have 2 texts or more, got {len(a)} and {len(b)}")
    count = max(2, round(fewest / 10)) if clusters is None else clusters
    check_number("clusters", count, 2, fewest)
    if not scaling_factor > 0:
        raise ValueError(f"scaling_factor must be above 0, got {scaling_factor}")
    for name, each in (("made", a), ("real", b)):
        if not np.isfinite(each).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    library = needed("mauve-text", "mauve", "MAUVE", "text")
    found = library.compute_mauve(
        p_features=a,
        q_features=b,
        num_buckets=count,
        mauve_scaling_factor=scaling_factor,
        seed=seed,
        verbose=False,
    )
    return float(found.mauve)
