"""A language model that denoises the next token's embedding, given the clean tokens before it.

    E^     = rows of target_table at unit length,    z = E^[x] + sigma noise
    noisy  = p z,    clean = clean_table[BOS, x_<]
    h      = layers(noisy, clean): noisy i sees clean j <= i and itself, clean i sees clean j <= i
    logits = `read_out.ReadOutHead` of h and z

p is that of `prediction.EDM`. arXiv:2506.14202, section 5.4 and appendix E.4. The two streams
are stacked as samples, noisy ones first. Clean token i is the one before x_i, BOS for the first,
and both streams stand at position i, as in any language model, whose query for x_i stands at the
token before it. The clean stream's condition is learned and knows no level, so that its keys and
values serve every level of a token that is being drawn.

A block reads the context through its own layers alone (clean="own", the paper's), or through all
layers before them too, which keep nothing and get no gradient (clean="through"). Then its context
is as deep as the stack up to it, and its steps read the weights of earlier blocks. The clean stream
may guess the next token itself, which is what trains the layers' keys and values for later blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.prediction import EDM, log_level
from dbkernels.diffusion.process import Interval
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.family import Presets
from dbkernels.models.layer import AdaLNLayer, run_layers
from dbkernels.models.read_out import ReadOutHead, per_token
from dbkernels.models.rotary import rotary_table
from dbkernels.models.text import CleanStream, NoisyTextConfig
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.backend.checks import Reduction, statistics_dtype
from dbkernels.ops.philox import Draw
from dbkernels.ops.table_rows import table_rows
from dbkernels.settings import check_choice


@dataclass(frozen=True, kw_only=True)
class ARConfig(NoisyTextConfig):
    """An autoregressive language model."""

    clean: CleanStream = "own"
    """Layers through which a block reads earlier tokens: its own, or all up to its last."""
    next_token_weight: float = 1.0
    """Weight of the clean stream's own cross-entropy in a block's loss; 0 leaves it out."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("clean", self.clean, get_args(CleanStream))
        if not 0 <= self.next_token_weight < float("inf"):
            raise ValueError(
                f"next_token_weight must be finite and at least 0, got {self.next_token_weight}"
            )

    @property
    def independent(self) -> bool:
        """Whether a block's steps read no layer of another."""
        return self.clean == "own"


PRESETS = {
    "paper": ARConfig(
        dim=768, depth=12, num_heads=12, mlp_hidden=2048, cond_dim=768,
        length=256, vocabulary=32000, next_token_weight=0.0,
    ),
    "small": ARConfig(
        dim=128, depth=6, num_heads=4, mlp_hidden=352, cond_dim=128, length=64, vocabulary=27,
    ),
}  # fmt: skip


class AR(Presets, nn.Module):
    """The autoregressive family: z is (B, S, dim), a prediction is logits (B, S, vocabulary)."""

    presets, smallest = PRESETS, "small"
    target_parts = ("target_table",)
    stem_and_head = ("stem",)

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config, self.sigma_data = config, config.sigma_data
        self.independent = config.independent
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
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.layers:
            layer.initialise(nn.init.xavier_uniform_)
        nn.init.normal_(self.target_table.weight, std=0.02)
        # tokens as large as the noisy ones', which are of about unit variance
        nn.init.normal_(self.clean_table.weight)
        nn.init.normal_(self.clean_condition)

    def unit_table(self) -> Tensor:
        """The words' embeddings at unit length, E^ (vocabulary, dim), at least float32."""
        table = self.target_table.weight
        return F.normalize(table.to(statistics_dtype(table)), dim=-1)

    def read_table(self) -> Tensor | None:
        """E^ where the head reads z, else None."""
        return self.unit_table() if self.head.reads_z else None

    def before(self, layers: Sequence[int]) -> Sequence[int]:
        """Layers that the clean stream passes through before these, without a gradient."""
        return range(layers[0]) if self.config.clean == "through" and layers else ()

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
        noisy, _ = self._rows(z, level, layers, batch["token"], guess=False)
        return self.head.logits(noisy, self.read_table())

    def guess(self, layers: Sequence[int], batch: Batch) -> Tensor:
        """Logits (B, S, vocabulary) of token i from the clean tokens before it alone."""
        rows, _ = self._guess(layers, batch)
        return self.head.logits(rows, self.read_table())

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum of scale times each sample's or token's cross-entropy in nats, a mean over tokens.

        The mean cross-entropy of the clean stream, times next_token_weight, is added.
        """
        token, guess = batch["token"], self.config.next_token_weight
        z = add_noise(self.target(batch), *self.prediction.path(level), draw)
        noisy, clean = self._rows(z, level, layers, token, guess=bool(guess))
        of_token = (
            scale if scale.dim() == 2 else (scale / token.shape[1])[:, None].expand(z.shape[:2])
        )
        if clean is not None:
            share = torch.full_like(of_token, guess / max(token.numel(), 1))
            of_token = torch.cat([of_token, share])
            noisy, token = torch.cat([noisy, clean]), token.repeat(2, 1)
        return self._cross_entropy(noisy, token, of_token.float(), "sum")

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy of each sample, mean over its tokens, (B,), in nats."""
        token = batch["token"]
        z = add_noise(self.target(batch), *self.prediction.path(level), draw)
        noisy, _ = self._rows(z, level, layers, token, guess=False)
        return self._cross_entropy(noisy, token, None, "none").mean(1)

    def conventional_loss(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """Mean cross-entropy of the next token, (), by the clean stream alone, in nats."""
        return self._cross_entropy(*self._guess(layers, batch), None, "mean")

    def conventional_losses(self, draw: Draw, layers: Sequence[int], batch: Batch) -> Tensor:
        """The same of each sample, (B,)."""
        return self._cross_entropy(*self._guess(layers, batch), None, "none").mean(1)

    def estimate(self, prediction: Tensor) -> Tensor:
        """The expected embedding under the logits, (B, S, dim); unit rows, as in training."""
        table = self.unit_table()
        return prediction.to(table.dtype).softmax(-1) @ table

    def _guess(self, layers: Sequence[int], batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows for the head of what the clean stream guesses, and the tokens that it should."""
        token = batch["token"]
        x, c = self._clean(layers, token), self._clean_condition(len(token))
        some = [self.layers[index] for index in layers]
        x = run_layers(some, x, c, self._rotary(token), attention="causal")
        return self.head.clean(x, c), token

    def _rows(
        self, z: Tensor, level: Tensor, layers: Sequence[int], token: Tensor, *, guess: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows for the head: of the noisy stream, and of the clean one where it guesses."""
        B = len(token)
        x, c = self.stem(z, level, self._clean(layers, token))
        some = [self.layers[index] for index in layers]
        num_samples = None if guess else B
        x = run_layers(
            some, x, c, self._rotary(token), attention="two_stream", num_samples=num_samples
        )
        noisy = self.head.noisy(x[:B], c[:B], z, level)
        return noisy, self.head.clean(x[B:], c[B:]) if guess else None

    def _clean(self, layers: Sequence[int], token: Tensor) -> Tensor:
        """The clean stream as the layers meet it, (B, S, dim)."""
        before = F.pad(token[:, :-1], (1, 0), value=self.config.vocabulary)
        x = table_rows(self.clean_table.weight, before)
        earlier = [self.layers[index] for index in self.before(layers)]
        if not earlier:
            return x
        with torch.no_grad():
            c = self._clean_condition(len(token))
            deep = run_layers(earlier, x, c, self._rotary(token), attention="causal")
        # the value of the deep one; the table learns as if the layers between added to it
        return deep + (x - x.detach())

    def _clean_condition(self, B: int) -> Tensor:
        return self.clean_condition.expand(B, -1)

    def _rotary(self, token: Tensor) -> Tensor:
        positions = torch.arange(token.shape[1], device=token.device)
        return rotary_table(positions, self.config.dim // self.config.num_heads)

    def stem(self, z: Tensor, level: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads, (2 B, S, dim), and the conditions, (2 B, ..., cond_dim)."""
        p, _ = self.prediction.input(per_token(level))
        c = self.condition(log_level(level))
        of_clean = self.clean_condition.to(c.dtype).expand_as(c)
        return torch.cat([(p * z).to(clean.dtype), clean]), torch.cat([c, of_clean])

    def _cross_entropy(
        self, rows: Tensor, token: Tensor, scale: Tensor | None, reduction: Reduction
    ) -> Tensor:
        return self.head.cross_entropy(rows, token, self.read_table(), scale, reduction)
