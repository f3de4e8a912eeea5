"""The loss of a network whose target is, in part, what a teacher predicts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.ops.backend.checks import statistics_dtype


def square_error(estimate: Tensor, taught: Tensor, clean: Tensor, share: float) -> Tensor:
    """Mean squared error (B,) of an estimate (B, ...) of (1 - share) clean + share taught."""
    wanted = torch.lerp(clean.to(estimate), taught.to(estimate), share)
    return (estimate - wanted).square().flatten(1).mean(1)


def cross_entropy(logits: Tensor, taught: Tensor, target: Tensor, share: float) -> Tensor:
    """Cross-entropy (...) in nats of logits (..., K) with the distribution

        (1 - share) [k = target] + share softmax(taught)[k]

    which is the same mixture of both cross-entropies.
    """
    wide = statistics_dtype(logits)
    told, given = F.log_softmax(logits, -1, dtype=wide), F.softmax(taught, -1, dtype=wide)
    of_target = told.gather(-1, target[..., None])[..., 0]
    return (share - 1) * of_target - share * (given * told).sum(-1)
