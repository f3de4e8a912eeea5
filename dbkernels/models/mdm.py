"""A masked diffusion language model: it reads a text with gaps and names what stands in each.

    z[i, j] = MASK with probability level[i], else token[i, j]
    c       = noise(1000 level)
    logits  = W ((1 + scale) * rms(layers(table[z], c)) + shift) + b
    loss[i] = sum over masked j of -ln softmax(logits[i, j])[token[i, j]] / S

Shi et al. 2024 (arXiv:2406.04329), MD4, and arXiv:2506.14202, section 5.3 and appendix D. Attention
is over all tokens, positions are rotary, and W has no column for MASK.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.masked import MASK
from dbkernels.diffusion.process import Interval
from dbkernels.models import embed
from dbkernels.models.branches import initialise_linear
from dbkernels.models.family import Presets
from dbkernels.models.layer import AdaLNLayer, run_layers
from dbkernels.models.rotary import rotary_table
from dbkernels.models.taught import cross_entropy as taught_entropy
from dbkernels.models.text import TextConfig
from dbkernels.ops import reference
from dbkernels.ops.adaln_norm import adaln_norm
from dbkernels.ops.linear_cross_entropy import linear_cross_entropy
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.ops.table_rows import table_rows

STEPS = 1000.0  # in all levels, as in MD4: sinusoids of [0, 1] would move one wave alone
MASKS = -1  # of a step's draws: layers have 0 and up, and the levels the draw itself
RARE = 32.0  # nats: a step has more masked tokens than `capacity` once in exp(32) steps
UNCOUNTED = -100  # target of a token that is not masked


@dataclass(frozen=True, kw_only=True)
class MDMConfig(TextConfig):
    """A masked diffusion model of text."""


PRESETS = {
    "text8": MDMConfig(
        dim=768, depth=12, num_heads=12, mlp_hidden=2048, cond_dim=128, length=256, vocabulary=27,
    ),
    "small": MDMConfig(
        dim=128, depth=6, num_heads=4, mlp_hidden=352, cond_dim=32, length=64, vocabulary=27,
    ),
}  # fmt: skip


class MDM(Presets, nn.Module):
    """The masked text family: z is (B, S) int64 with MASK, a prediction is logits (B, S, V)."""

    presets, smallest = PRESETS, "small"
    target_parts = ()
    stem_and_head = ("stem", "tail")
    # of numbers, which tokens are not
    sigma_data, prediction = 1.0, None
    independent = True

    def __init__(self, config: MDMConfig):
        super().__init__()
        self.config = config
        layer, D = config.layer(), config.dim
        self.table = nn.Embedding(config.vocabulary + 1, D)  # the last row is that of MASK
        self.condition = embed.NoiseEmbedding(config.cond_dim)
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(config.depth))
        self.modulation = embed.FinalModulation(D, config.cond_dim)
        self.head = embed.Linear(D, config.vocabulary)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.layers:
            layer.initialise(nn.init.xavier_uniform_)
        initialise_linear(self.head, nn.init.zeros_)
        nn.init.normal_(self.table.weight, std=0.02)

    def target(self, batch: Batch) -> Tensor:
        """The tokens themselves, (B, S) int64."""
        return batch["token"]

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, S), from batch["token"]."""
        return tuple(batch["token"].shape)

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,)."""
        return (len(batch["token"]),)

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, S, V) of every place, from z with MASK in some, at levels (B,)."""
        return self.head(self._answer(z, level, layers))

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale (B,) times the loss of each sample, in nats.

        The head works on no more tokens than the interval's levels ever mask. A step that masks
        more would have a loss of NaN.
        """
        token, masked = batch["token"], self.masked(draw, level, batch)
        x = self._answer(token.masked_fill(masked, MASK), level, layers).flatten(0, 1)
        share = (scale / max(token.shape[1], 1))[:, None]
        weight, target = masked.mul(share).float().flatten(), token.flatten()
        count = self.capacity(len(x), interval.high)
        if count < len(x):
            first = masked.flatten().logical_not().byte().argsort(stable=True)[:count]
            x, weight, target = (t.index_select(0, first) for t in (x, weight, target))
            # what was left out is known on the device alone, where nobody waits for it
            weight = weight.masked_fill(masked.sum() > count, math.nan)
        return linear_cross_entropy(
            x, self.head.weight, target, bias=self.head.bias, token_weight=weight, reduction="sum"
        )

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Sum of the masked tokens' cross-entropies over S of each sample, (B,), in nats."""
        token, masked = batch["token"], self.masked(draw, level, batch)
        x = self._answer(token.masked_fill(masked, MASK), level, layers)
        target = token.masked_fill(~masked, UNCOUNTED)
        head = self.head.weight, target
        nll = linear_cross_entropy(x, *head, bias=self.head.bias, reduction="none")
        return nll.sum(1) / max(token.shape[1], 1)

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z (B, S) of the tokens themselves, with MASK in some places."""
        return batch["token"].masked_fill(self.masked(draw, level, batch), MASK)

    def taught_loss(
        self,
        z: Tensor,
        taught: Tensor,
        share: float,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
    ) -> Tensor:
        """Sum of scale (B,) times the loss of each sample with taught tokens, in nats."""
        token = batch["token"]
        each = taught_entropy(self.denoise(z, level, layers, batch), taught, token, share)
        of_sample = each.masked_fill(z != MASK, 0).sum(1) / max(token.shape[1], 1)
        return (scale.float() * of_sample).sum()

    def masked(self, draw: Draw, level: Tensor, batch: Batch) -> Tensor:
        """Which tokens a draw masks at levels (B,): (B, S) bool, the same whenever it is asked."""
        token = batch["token"]
        u = uniforms(draw.nth(MASKS), *token.shape, device=token.device)
        return u < level[:, None]

    def capacity(self, tokens: int, highest: float) -> int:
        """A number of tokens, more of which a step masks once in exp(RARE) steps.

        Each is masked by itself, with a probability of p at most: by Bernstein's inequality

            P(masked > N p + x) <= exp(-x**2 / (2 (N p (1 - p) + x / 3)))

        Args:
            tokens:   N, of all samples
            highest:  p, the greatest level that the step may have
        """
        third = RARE / 3
        more = third + math.sqrt(third**2 + 2 * RARE * tokens * highest * (1 - highest))
        return min(tokens, math.ceil(tokens * highest + more))

    def _answer(self, z: Tensor, level: Tensor, layers: Sequence[int]) -> Tensor:
        """What the head reads of every place, (B, S, D)."""
        config, c = self.config, self.stem(level)
        # the row is the last one, whatever number stands for MASK
        row = torch.where(z == MASK, config.vocabulary, z)
        # a program is of torch's own ops, as that of a layer is
        exporting = torch.compiler.is_exporting()
        x = self.table(row) if exporting else table_rows(self.table.weight, row)
        positions = torch.arange(z.shape[1], device=z.device)
        rotary = rotary_table(positions, config.dim // config.num_heads)
        return self.tail(run_layers([self.layers[index] for index in layers], x, c, rotary), c)

    def stem(self, level: Tensor) -> Tensor:
        """The condition (B, cond_dim) of levels (B,)."""
        return self.condition(level * STEPS)

    def tail(self, x: Tensor, c: Tensor) -> Tensor:
        """What the head reads of what the last layer left, (B, S, D)."""
        shift, scale = self.modulation.parts(c)
        if torch.compiler.is_exporting():
            return reference.adaln_norm(x, scale, shift, norm="rms").to(scale.dtype)
        return adaln_norm(x, scale, shift, norm="rms", dtype=scale.dtype)

    def estimate(self, prediction: Tensor) -> Tensor:
        """Probabilities (B, S, V) of every place's token, which a sampler draws from."""
        return F.softmax(prediction.float(), dim=-1)
