"""What models share that denoise the embeddings of tokens: the target, its levels, and the losses.

E^ = rows of target_table at unit length,    z = E^[x] + sigma noise
loss of a token = -ln softmax(logits)[x]
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.prediction import EDM
from dbkernels.diffusion.process import Interval
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.family import Presets
from dbkernels.models.layer import AdaLNLayer, run_layers
from dbkernels.models.read_out import ReadOutHead
from dbkernels.models.rotary import rotary_table
from dbkernels.models.taught import cross_entropy
from dbkernels.models.text import NoisyTextConfig
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.backend.checks import Reduction, statistics_dtype
from dbkernels.ops.philox import Draw
from dbkernels.ops.table_rows import table_rows


class NoisyText(Presets, nn.Module):
    """A model of text whose z is (B, S, dim) and whose prediction is logits (B, S, vocabulary).

    A family says what its head reads: `read`. Clean tokens have a table of their own, with a row
    for BOS, and a condition that is learned and knows no level.
    """

    target_parts = ("target_table",)
    stem_and_head = ("stem", "tail")

    def __init__(self, config: NoisyTextConfig):
        super().__init__()
        self.config, self.sigma_data = config, config.sigma_data
        self.prediction = EDM(config.sigma_data)
        layer, D, V = config.layer(), config.dim, config.vocabulary
        self.target_table = nn.Embedding(V, D)
        self.clean_table = nn.Embedding(V + 1, D)  # the last row is BOS
        self.condition = NoiseEmbedding(config.cond_dim)
        self.clean_condition = nn.Parameter(
            torch.empty(config.cond_dim, dtype=torch.get_default_dtype())
        )
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(config.depth))
        self.head = ReadOutHead(config)
        for each in self.layers:
            each.initialise(nn.init.xavier_uniform_)
        nn.init.normal_(self.target_table.weight, std=0.02)
        # tokens as large as the noisy ones', which are of about unit variance
        nn.init.normal_(self.clean_table.weight)
        nn.init.normal_(self.clean_condition)

    def read(self, z: Tensor, level: Tensor, layers: Sequence[int], token: Tensor) -> Tensor:
        """Rows for the head of noisy tokens z at their levels, from some layers."""
        raise NotImplementedError

    def tail(self, h: Tensor, c: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """What the head multiplies, from what the last layer left of z and its condition."""
        return self.head.noisy(h, c, z, level)

    def target(self, batch: Batch) -> Tensor:
        """The tokens' embeddings at unit length, (B, S, dim); the gradient reaches the table."""
        rows = table_rows(self.target_table.weight, batch["token"], unit=True)
        return rows.to(statistics_dtype(rows))

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B, S, dim), from batch["token"]."""
        return *batch["token"].shape, self.config.dim

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """(B,), or (B, S) where each token has a level of its own."""
        B, S = batch["token"].shape
        return (B,) if self.config.levels_of == "sample" else (B, S)

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, S, vocabulary) of token i from z at sigma and the clean tokens before it."""
        return self.head.logits(self.read(z, level, layers, batch["token"]), self.read_table())

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale times each sample's or token's cross-entropy in nats, a mean over tokens."""
        token = batch["token"]
        rows = self.read(self.noisy(level, batch, draw), level, layers, token)
        return self.cross_entropy(rows, token, scale_of_token(scale, token), "sum")

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
        """Sum of scale times the cross-entropy with taught words in nats, a mean over tokens."""
        rows = self.read(z, level, layers, batch["token"])
        return self.taught_entropy(rows, taught, share, scale, batch["token"])

    def taught_entropy(
        self, rows: Tensor, taught: Tensor, share: float, scale: Tensor, token: Tensor
    ) -> Tensor:
        """The same of rows that the head reads; the logits of all words are held, of both."""
        logits = self.head.logits(rows, self.read_table())
        return (scale_of_token(scale, token) * cross_entropy(logits, taught, token, share)).sum()

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy of each sample, mean over its tokens, (B,), in nats."""
        token = batch["token"]
        rows = self.read(self.noisy(level, batch, draw), level, layers, token)
        return self.cross_entropy(rows, token, None, "none").mean(1)

    def estimate(self, prediction: Tensor) -> Tensor:
        """The expected embedding under the logits, (B, S, dim); unit rows, as in training."""
        table = self.unit_table()
        return prediction.to(table.dtype).softmax(-1) @ table

    def unit_table(self) -> Tensor:
        """The words' embeddings at unit length, E^ (vocabulary, dim), at least float32."""
        table = self.target_table.weight
        return F.normalize(table.to(statistics_dtype(table)), dim=-1)

    def read_table(self) -> Tensor | None:
        """E^ where the head reads z, else None."""
        return self.unit_table() if self.head.reads_z else None

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z of the batch's own tokens, with the noise that a draw names."""
        return add_noise(self.target(batch), *self.prediction.path(level), draw)

    def tokens_before(self, token: Tensor) -> Tensor:
        """Of each token the one before it, BOS for the first, from the clean table: (B, S, dim)."""
        before = F.pad(token[:, :-1], (1, 0), value=self.config.vocabulary)
        if torch.compiler.is_exporting():  # as a layer does
            return F.embedding(before, self.clean_table.weight)
        return table_rows(self.clean_table.weight, before)

    def constant_condition(self, B: int) -> Tensor:
        """Of clean tokens, (B, cond_dim)."""
        return self.clean_condition.expand(B, -1)

    def run(self, layers: Sequence[int], x: Tensor, c: Tensor) -> Tensor:
        """Some layers in order on tokens x (B, S, dim), each of which sees those before it."""
        some = [self.layers[index] for index in layers]
        return run_layers(some, x, c, self.rotary(x), attention="causal")

    def rotary(self, x: Tensor) -> Tensor:
        """Of the positions of x (B, S, ...), (2, S, d)."""
        positions = torch.arange(x.shape[1], device=x.device)
        return rotary_table(positions, self.config.dim // self.config.num_heads)

    def cross_entropy(
        self, rows: Tensor, token: Tensor, scale: Tensor | None, reduction: Reduction
    ) -> Tensor:
        """As that of the head, from rows that it reads."""
        return self.head.cross_entropy(rows, token, self.read_table(), scale, reduction)


def scale_of_token(scale: Tensor, token: Tensor) -> Tensor:
    """What each token's loss counts for, (B, S) float32, where scale is of samples or of tokens."""
    if scale.dim() == 1:
        scale = (scale / token.shape[1])[:, None].expand(token.shape)
    return scale.float()
