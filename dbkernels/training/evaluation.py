"""What trained blocks are worth on some data: means over its samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch

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
    starts:              by name, after the last level of each single start of those whose
                         probabilities were averaged; empty where there was one
    """

    block_losses: tuple[float, ...]
    loss_at_most_noise: float
    levels: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    starts: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = {
            "loss of each block": _written(self.block_losses),
            "loss at the most noise": _written((self.loss_at_most_noise,)),
        }
        for name, values in self.metrics.items():
            lines[f"{name.replace('_', ' ')} after each step"] = _written(values)
        for name, values in self.starts.items():
            spread = f"{fmean(values):.4g} ± {stdev(values):.1g}"
            lines[f"{name.replace('_', ' ')} of one start"] = spread
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def _written(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.4g}" for value in values)


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
