"""Whether a classifier is right as often as it says.

    ECE = sum_m |B_m| / N * |mean of right - mean of confidence in B_m|

B_m has the samples whose confidence, the highest of their probabilities, is in the m-th of equal
parts of (0, 1]. Guo et al. 2017 (arXiv:1706.04599), equations 2 and 3.
"""

import torch
from torch import Tensor

from dbkernels.settings import check_number

BINS = 15  # of the paper
SUM = 0.02  # by which probabilities that were bfloat16 may miss one


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Expected calibration error, in [0, 1]; 0 is a classifier that knows how often it is right.

    Args:
        probabilities:  (N, C) floating-point; each row is in [0, 1] and sums to one
        labels:         (N,) int64, each in [0, C)
        bins:           equal parts of the confidence
    Raises:
        ValueError: an argument has another shape or dtype, or is out of its range, or N is 0.
    """
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or not len(probabilities):
        raise ValueError(
            "probabilities must be (N, C) floating-point with at least one row, "
            f"got {tuple(probabilities.shape)} {probabilities.dtype}"
        )
    N, C = probabilities.shape
    if labels.shape != (N,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({N},) int64, got {tuple(labels.shape)} {labels.dtype}")
    if labels.min() < 0 or labels.max() >= C:
        least, most = labels.min().item(), labels.max().item()
        raise ValueError(f"labels must be in [0, {C}), got {least} to {most}")
    exact = probabilities.detach().double()
    # NaN fails here too
    if not (exact.min() >= 0 and ((exact.sum(1) - 1).abs() <= SUM).all()):
        raise ValueError(
            "probabilities must be 0 or more and sum to 1 in each row, got rows that sum to "
            f"{exact.sum(1).min():.4g} to {exact.sum(1).max():.4g}, and {exact.min():.4g} at least"
        )
    confidence, answer = exact.max(1)
    return error_of_bins(confidence, (answer == labels).double(), bins=bins)


def error_of_bins(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> float:
    """The expected calibration error of answers.

    Args:
        confidence:  (N,) float64, in (0, 1]
        right:       (N,) float64, 1 where the answer is right and 0 elsewhere
        bins:        equal parts of the confidence
    """
    check_number("bins", bins, 1)
    # of parts that are open below and closed above
    part = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    surplus = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    return float(surplus.index_add_(0, part, right - confidence).abs().sum()) / len(confidence)
