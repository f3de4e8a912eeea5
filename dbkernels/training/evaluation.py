"""What trained blocks are worth on some data: means over its samples, and distances of samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbkernels.data.images import Batch, Data
from dbkernels.models.registry import TextNoise
from dbkernels.ops.philox import Draw, stream_seed
from dbkernels.training.pending import Staging

LEVELS_PER_BLOCK = 8  # quantiles of each block's interval at which its loss is read
# of an evaluation, by what noise does to a text; None is no text
SETTINGS: dict[TextNoise | None, tuple[str, ...]] = {
    None: ("levels", "start", "starts"),
    "masked": (),
    "gaussian": ("levels", "starts", "bridge"),
}
EVALUATION_KEY = 2**62 + 1  # keeps evaluation's streams apart from training's
Told = Callable[[int, int], None]  # how many passes of a sample through a block, and of how many


@dataclass
class Passes:
    """Passes of a sample through a block that an evaluation has made, of those that it makes."""

    told: Told = lambda done, total: None
    """Is called with both whenever some were made."""
    total: int = 0
    done: int = 0

    def made(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.told(self.done, self.total)


@dataclass(frozen=True)
class Evaluation:
    """What trained blocks are worth; printed as a few lines.

    block_losses:        mean loss of each block over the levels that it serves, unweighted
    loss_at_most_noise:  mean loss at the highest level
    levels:              descending, of the sampler that the metrics were read from
    metrics:             by name, after each level; shares are in [0, 1], cross-entropies in nats
    """

    block_losses: tuple[float, ...]
    loss_at_most_noise: float
    levels: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        lines = {
            "loss of each block": self.block_losses,
            "loss at the most noise": (self.loss_at_most_noise,),
        }
        for name, values in self.metrics.items():
            lines[f"{name.replace('_', ' ')} after each step"] = values
        width = max(map(len, lines))
        return "\n".join(
            f"{name:{width}}  {'  '.join(f'{value:.4g}' for value in values)}"
            for name, values in lines.items()
        )


def batches(
    data: Data, batch_size: int, device: torch.device | str, *, seed: int = 0
) -> Iterator[tuple[Batch, Draw]]:
    """The samples in order, each once, and their noise: the same in batches of any size.

    Args:
        data:        every sample of it
        batch_size:  the last batch may be shorter
        device:      to bring them to
        seed:        of the noise
    """
    put = Staging(device).put
    for indices in torch.arange(len(data)).split(batch_size):
        draw = Draw(stream_seed(seed, EVALUATION_KEY), step=0, sample=int(indices[0]))
        yield data.batch(indices, put), draw


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Distance of two sets of features, each taken as a normal distribution.

        |m1 - m2|**2 + tr(C1 + C2 - 2 (C1 C2)**(1/2))

    Dowson & Landau 1982. Called FID only where the features are Inception's.

    Args:
        first:   (N, K)  features, N at least 2
        second:  (M, K)
    """
    a, b = (features.double().cpu().numpy() for features in (first, second))
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
