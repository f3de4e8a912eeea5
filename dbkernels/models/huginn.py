"""A language model that runs its middle layers again and again, or once on noisy tokens.

    e = prelude(clean_table[BOS, x_<])
    s <- core(A [rms(s); e]) from noise, some times,    logits = head(coda(s))        conventional
    h = coda(core(A [c_in z; e])),                      logits = head(h, z)           denoising

The first is Huginn (Geiping et al. 2025, arXiv:2502.05171), which backpropagates through the last
few of a random number of recurrences. The second is arXiv:2506.14202, section 5.5: one pass is
trained, with a noisy token z where the state stood, and the levels of a sampler are the recurrence.
c_in is that of `prediction.EDM`, and the head is `read_out.ReadOutHead`.

Everything is causal. The state at position i carries x_i, which it is to name, with noise. It reads
the tokens before x_i without noise through e, and the states before it, whose tokens it may know:
so no clean stream is needed beside the noisy one. Whoever draws x_i at a level gives the states
before it their own tokens with new noise of that level, as in training.

The prelude's condition is a learned constant, and that of the core and the coda adds to it what
depends on the level; without noise, the constant serves all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import ndtri, pdtr
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.path import log_level
from dbkernels.models.embed import Linear
from dbkernels.models.layer import make_norm
from dbkernels.models.noisy_text import NoisyText
from dbkernels.models.read_out import per_token
from dbkernels.models.text import NoisyTextConfig, ReadOut
from dbkernels.ops.backend.noise_tile import LEVEL
from dbkernels.ops.philox import Draw, counter_words, key_words, normals, philox
from dbkernels.settings import check_number

if TYPE_CHECKING:  # a Python of 3.10 has none
    from typing_extensions import Self


SPREAD = 0.5  # standard deviation of the logarithm of the rate of recurrences, as in Huginn
RECURRENCES = 0  # of a step's draws


@dataclass(frozen=True, kw_only=True)
class HuginnConfig(NoisyTextConfig):
    """A recurrent-depth language model."""

    prelude: int
    """First layers, which read the tokens before each."""
    coda: int
    """Last layers, which come after the recurrence. Those between are its core."""
    read_out: ReadOut = "posterior"
    """As of all such models; one pass has learned sooner with the posterior in small runs."""
    recurrences: int = 32
    """Without noise: mean of the rate in training, and the number in evaluation."""
    truncation: int = 8
    """Without noise: the gradient passes through so many recurrences, the last ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("prelude", 0), ("coda", 0), ("recurrences", 1), ("truncation", 1)):
            check_number(name, getattr(self, name), least)
        if self.prelude + self.coda >= self.depth:
            raise ValueError(
                f"depth must leave a layer between prelude {self.prelude} and coda {self.coda}, "
                f"got {self.depth}"
            )

    def as_blocks(self) -> "HuginnConfig":
        """With what lets a network that never met noise keep what it knows."""
        return replace(self, read_out="posterior")

    def resized(self, sizes: dict[str, int]) -> "Self":
        """With other sizes by field; prelude and coda keep their ratios to depth too."""
        if "depth" in sizes:
            ends = {k: getattr(self, k) * sizes["depth"] // self.depth for k in ("prelude", "coda")}
            sizes = ends | sizes
        return super().resized(sizes)


PRESETS = {
    "paper": HuginnConfig(
        dim=512, depth=8, num_heads=8, mlp_hidden=2048, cond_dim=512, length=256, vocabulary=50257,
        prelude=2, coda=2, read_out="paper",
    ),
    "small": HuginnConfig(
        dim=128, depth=4, num_heads=4, mlp_hidden=352, cond_dim=128, length=64, vocabulary=27,
        prelude=1, coda=1, recurrences=8, truncation=4,
    ),
}  # fmt: skip


class Huginn(NoisyText):
    """The recurrent family, which the paper trains as one block.

    Of any block, the prelude's layers with which it begins read the tokens, and all others the
    state.
    """

    config: HuginnConfig
    presets, smallest = PRESETS, "small"
    independent = True

    def __init__(self, config: HuginnConfig):
        super().__init__(config)
        # A [s; e] = from_state s + from_tokens e, a Xavier projection of 2 dim to dim numbers
        self.from_state, self.from_tokens = (
            Linear(config.dim, config.dim, bias=False) for _ in range(2)
        )
        for half in (self.from_state, self.from_tokens):
            nn.init.xavier_uniform_(half.weight, gain=math.sqrt(2 / 3))
        self.norm = make_norm(config.layer())

    def add_noise(self) -> None:
        """Give a network that never met noise a condition that all levels leave as it is.

        With read_out="posterior" a pass then is the last of the recurrences, from a state along z,
        and adds to the logits what z tells by Bayes' rule.
        """
        with torch.no_grad():
            self.condition.fc2.weight.zero_()
            self.condition.fc2.bias.zero_()

    def read(self, z: Tensor, level: Tensor, layers: Sequence[int], token: Tensor) -> Tensor:
        """Rows for the head of one pass: of token i from z up to i and the tokens before i."""
        prelude = list(takewhile(lambda index: index < self.config.prelude, layers))
        x, c = self.stem(z, level, self._prelude(prelude, token))
        return self.tail(self.run(layers[len(prelude) :], x, c), c, z, level)

    def stem(self, z: Tensor, level: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """What the core's first layer reads, (B, S, dim), and the condition, (B, ..., cond_dim)."""
        p = self.prediction.scale(per_token(level))
        c = self.condition(log_level(level))
        return self._adapted(p * z, self.from_tokens(e)), c + self.clean_condition.to(c.dtype)

    def conventional_loss(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """Mean cross-entropy, (), in nats, after the number of recurrences that the draw names.

        It is the same for all samples of a step, and on every device.

        Raises:
            ValueError: layers are not of prelude, core and coda in this order, or the draw's step
                is a tensor, as in a CUDA graph, which cannot have another number in each step.
        """
        rows = self.recurred(draw, layers, batch["token"], self.recurrences(draw))
        return self.cross_entropy(rows, batch["token"], None, "mean")

    def conventional_losses(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """The same of each sample, (B,), after the configuration's number of recurrences."""
        rows = self.recurred(draw, layers, batch["token"], self.config.recurrences)
        return self.cross_entropy(rows, batch["token"], None, "none").mean(1)

    def guess(self, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, S, vocabulary) of the same, always from the same noise."""
        rows = self.recurred(Draw(0, 0), layers, batch["token"], self.config.recurrences)
        return self.head.logits(rows, self.read_table())

    def recurrences(self, draw: Draw) -> int:
        """Number of a step, 1 + Poisson(rate) with a log-normal rate.

        Raises:
            ValueError: the draw's step is a tensor.
        """
        if isinstance(draw.step, Tensor):
            raise ValueError(
                "cuda_graphs must be off where steps differ in how often layers run, got a step in "
                "a tensor"
            )
        own = draw.nth(RECURRENCES)
        # of integers, because the host needs it, and no device is to change it
        words = philox(0, 0, *counter_words(own.step, LEVEL), *key_words(own.seed))
        of_rate, of_number = ((word + 0.5) / 2**32 for word in words[:2])
        rate = self.config.recurrences * math.exp(SPREAD * float(ndtri(of_rate)) - SPREAD**2 / 2)
        counts = np.arange(math.ceil(rate + 12 * math.sqrt(rate)) + 30)
        return 1 + int(np.searchsorted(pdtr(counts, rate), of_number))

    def recurred(
        self, draw: Draw, layers: Sequence[int], token: Tensor, recurrences: int
    ) -> Tensor:
        """Rows for the head after so many recurrences from the noise that a draw names."""
        prelude, core, coda = self._parts(layers)
        e, c = self._prelude(prelude, token), self.constant_condition(token.shape[0])
        of_tokens = self.from_tokens(e)
        start = normals(draw, token.shape[0], e[0].numel(), e.device)
        state = start.view(e.shape).to(e.dtype)
        for left in reversed(range(recurrences)):
            passes = torch.is_grad_enabled() and left < self.config.truncation
            with torch.set_grad_enabled(passes):
                state = self.run(core, self._adapted(self.norm(state), of_tokens), c)
        return self.head.clean(self.run(coda, state, c), c)

    def _prelude(self, layers: Sequence[int], token: Tensor) -> Tensor:
        """e, (B, S, dim)."""
        return self.run(layers, self.tokens_before(token), self.constant_condition(token.shape[0]))

    def _adapted(self, state: Tensor, of_tokens: Tensor) -> Tensor:
        # the stream stays wide under autocast
        x = self.from_state(state) + of_tokens
        return x.to(self.clean_table.weight.dtype)

    def _parts(self, layers: Sequence[int]) -> list[list[int]]:
        """The layers of prelude, core and coda."""
        first = 0, self.config.prelude, self.config.depth - self.config.coda
        ends = *first[1:], self.config.depth
        parts = [[i for i in layers if a <= i < b] for a, b in zip(first, ends, strict=True)]
        if [i for part in parts for i in part] != list(layers):
            raise ValueError(
                f"layers must be of prelude, core and coda in this order, got {list(layers)}"
            )
        return parts
